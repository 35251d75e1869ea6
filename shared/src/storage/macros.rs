//! One SQL text, typed for both databases.

/// Runs a statement in a transaction; gives the number of rows.
macro_rules! execute {
    ($tx:expr, $operation:literal, $sql:expr $(, $bind:expr)* $(,)?) => {{
        $tx.store.work.statement();
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query($sql)$(.bind($bind))*.execute(&mut **tx).await.map(|done| done.rows_affected())
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement = sqlx::query($sql)$(.bind($bind))*.execute(&mut **tx);
                $tx.store.liveness.in_time(statement).await.map(|done| done.rows_affected())
            }
        }
        .map_err($crate::storage::Error::during($operation))
    }};
}

/// Runs a statement in a transaction; gives its rows with `fetch_optional` or `fetch_all`.
macro_rules! fetch {
    ($tx:expr, $operation:literal, $fetch:ident => $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {{
        $tx.store.work.statement();
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx).await
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx);
                $tx.store.liveness.in_time(statement).await
            }
        }
        .map_err($crate::storage::Error::during($operation))
    }};
}

/// Reads rows and locks them until the end of the transaction: PostgreSQL needs to be told; on SQLite the
/// transaction is the only writer anyway.
macro_rules! fetch_locked {
    ($tx:expr, $operation:literal, $fetch:ident => $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {{
        $tx.store.work.statement();
        match &mut $tx.db {
            $crate::storage::TxDb::Sqlite(tx) => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(&mut **tx).await
            }
            $crate::storage::TxDb::Postgres(tx) => {
                let statement =
                    sqlx::query_as::<_, $row>(concat!($sql, " for update"))$(.bind($bind))*.$fetch(&mut **tx);
                $tx.store.liveness.in_time(statement).await
            }
        }
        .map_err($crate::storage::Error::during($operation))
    }};
}

/// Runs a statement on a connection of the pool. The wait for the connection has its own limit: a pool that is in full
/// use says nothing about the database, and must not count as a database that doesn't answer.
macro_rules! on_connection {
    ($store:expr, $pool:expr, |$connection:ident| $statement:expr) => {
        // Boxed, since a future holds everything twice that it is given and waits for.
        Box::pin(async {
            let mut connection = $pool.acquire().await?;
            let $connection = &mut *connection;
            $store.liveness.in_time($statement).await
        })
        .await
    };
}

/// Reads rows outside a transaction.
macro_rules! read {
    ($store:expr, $operation:literal, $fetch:ident => $row:ty, $sql:expr $(, $bind:expr)* $(,)?) => {{
        $store.work.statement();
        match &*$store.db {
            $crate::storage::Db::Sqlite { reader, .. } => {
                sqlx::query_as::<_, $row>($sql)$(.bind($bind))*.$fetch(reader).await
            }
            $crate::storage::Db::Postgres(pool) => {
                let statement = sqlx::query_as::<_, $row>($sql)$(.bind($bind))*;
                $crate::storage::macros::on_connection!($store, pool, |connection| statement.$fetch(connection))
            }
        }
        .map_err($crate::storage::Error::during($operation))
    }};
}

/// The text that takes an advisory lock of PostgreSQL until the end of the transaction. Its first number is a class of
/// our own, so that other programs in the same database can lock what they like.
macro_rules! lock {
    (try, $number:literal, of = lanes) => {
        concat!("select pg_try_advisory_xact_lock(1668638072, ", $number, ")")
    };
    ($shared:literal, $number:literal) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638068, ",
            $number,
            ")"
        )
    };
    ($shared:literal, $number:literal, of = groups) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638069, ",
            $number,
            ")"
        )
    };
    ($shared:literal, $number:literal, of = numbers) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638071, ",
            $number,
            ")"
        )
    };
    ($shared:literal, $number:literal, of = streams) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638070, ",
            $number,
            ")"
        )
    };
    ($shared:literal, $number:literal, of = sessions) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638073, ",
            $number,
            ")"
        )
    };
    ($shared:literal, $number:literal, of = lanes) => {
        concat!(
            "select pg_advisory_xact_lock",
            $shared,
            "(1668638072, ",
            $number,
            ")"
        )
    };
}

pub(super) use {execute, fetch, fetch_locked, lock, on_connection, read};
