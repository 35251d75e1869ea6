//! What is said once about the whole database: its name, and which `SECRET_KEY` it belongs to.

use super::{Error, Result, Store, execute, fetch};
use crate::clock;

impl Store {
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
