//! What is said once about the whole database: its name, and which `DATA_DIR` and `SECRET_KEY` it belongs to.

use super::{Db, Error, Result, Store, execute, fetch, read};
use crate::clock::{self, Timestamp};

impl Store {
    /// Compares this machine's clock with the database's: by how many seconds it is ahead, if they differ by more than
    /// 10 s. SQLite's is that of the machine, as the library reads it.
    pub async fn check_clock(&self) -> Result<Option<i64>> {
        let before = clock::local();
        let row = match &*self.db {
            Db::Sqlite { .. } => read!(
                self,
                "read the time",
                fetch_one => (Timestamp,),
                "select cast(unixepoch('subsec') * 1000000 as integer)"
            ),
            Db::Postgres(_) => read!(
                self,
                "read the time",
                fetch_one => (Timestamp,),
                "select cast(extract(epoch from clock_timestamp()) * 1000000 as bigint)"
            ),
        }?;
        clock::compare(before, row.0, clock::local());
        Ok(clock::ahead())
    }

    /// The name of this database's content, made with it. `DATA_DIR` must hold the same.
    pub async fn instance_id(&self) -> Result<String> {
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "name the database",
            "insert into instance (instance_number, instance_id, created_at) values (1, $1, $2) on conflict do nothing",
            uuid::Uuid::new_v4().to_string(),
            clock::now()
        )?;
        let row = fetch!(
            tx,
            "name the database",
            fetch_optional => (String,),
            "select instance_id from instance"
        )?;
        tx.commit().await?;
        row.map(|row| row.0)
            .ok_or_else(|| Error::during("name the database")("no row".to_owned()))
    }

    /// The name of the database's `DATA_DIR`, if it has one yet.
    pub async fn data_dir_id(&self) -> Result<Option<String>> {
        let row = read!(
            self,
            "read the name of DATA_DIR",
            fetch_optional => (Option<String>,),
            "select data_dir_id from instance"
        )?;
        Ok(row.and_then(|row| row.0))
    }

    /// Makes the database know the name of its `DATA_DIR`, if it knows none; the one that it knows then.
    pub async fn bind_data_dir(&self, id: &str) -> Result<String> {
        self.instance_id().await?;
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "bind DATA_DIR",
            "update instance set data_dir_id = $1 where data_dir_id is null",
            id
        )?;
        let row = fetch!(
            tx,
            "bind DATA_DIR",
            fetch_optional => (Option<String>,),
            "select data_dir_id from instance"
        )?;
        tx.commit().await?;
        row.and_then(|row| row.0)
            .ok_or_else(|| Error::during("bind DATA_DIR")("no row".to_owned()))
    }

    /// Makes the database know this value derived from `SECRET_KEY`, if it knows none; whether it is the one it knows.
    pub async fn bind_secret(&self, check: &str) -> Result<bool> {
        self.instance_id().await?;
        let mut tx = self.begin().await?;
        execute!(
            tx,
            "bind SECRET_KEY",
            "update instance set secret_check = $1 where secret_check is null",
            check
        )?;
        let row = fetch!(
            tx,
            "bind SECRET_KEY",
            fetch_optional => (Option<String>,),
            "select secret_check from instance"
        )?;
        tx.commit().await?;
        let (known,) = row.ok_or_else(|| Error::during("bind SECRET_KEY")("no row".to_owned()))?;
        Ok(known.as_deref() == Some(check))
    }
}
