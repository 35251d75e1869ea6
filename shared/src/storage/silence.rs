//! Silence: a connection to PostgreSQL whose other end is gone without a word, because a firewall forgot it or a machine
//! lost its power. The system doesn't tell for a quarter of an hour, so every wait for an answer has a limit on this
//! side. A connection that was silent isn't used again, nor is any that is older than the silence.
//!
//! What brings the tables up to date has no limit: it may take long, and a process that starts can wait.

use sqlx::postgres::{PgConnection, PgPoolOptions};
use sqlx::{Connection, Error};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout;

/// A statement that has no answer by then gets none. The server itself gives up a lock after half of that.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// A connection that lay idle says by then that it lives.
const ALIVE_WITHIN: Duration = Duration::from_secs(1);

/// A connection that answered so lately isn't asked whether it lives.
const FRESH: Duration = Duration::from_millis(500);

/// A connection that is given back has ended by then what it was last asked, or isn't worth keeping.
const DONE_WITHIN: Duration = Duration::from_secs(5);

/// What this process knows of connections that didn't answer.
#[derive(Debug, Default)]
pub(super) struct Silence {
    last: watch::Sender<Option<Instant>>,
}

impl Silence {
    /// Waits for the answer to a statement, for so long as one may take. What is given up is dropped, and its
    /// connection with it.
    pub(super) fn in_time<T, E: From<Error>>(
        &self,
        statement: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T, E>> {
        self.within(ANSWERS_WITHIN, statement)
    }

    /// The same for another limit.
    fn within<T, E: From<Error>>(
        &self,
        limit: Duration,
        statement: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T, E>> {
        // Boxed, since a future holds everything twice that it is given and waits for.
        let answer = timeout(limit, Box::pin(statement));
        async move {
            match answer.await {
                Ok(answered) => answered,
                Err(_) => {
                    self.last.send_replace(Some(Instant::now()));
                    Err(no_answer().into())
                }
            }
        }
    }

    /// Waits until a connection of this process doesn't answer.
    pub(super) async fn begins(&self) {
        // The sender lives as long as this.
        let _ = self.last.subscribe().changed().await;
    }

    /// Keeps connections that don't answer out of a pool: each is tried before it is used, unless
    /// it has just been used, and before it is kept.
    pub(super) fn guard(self: &Arc<Self>, pool: PgPoolOptions) -> PgPoolOptions {
        let (taken, given_back) = (self.clone(), self.clone());
        pool.test_before_acquire(false)
            .before_acquire(move |connection, known| {
                let silence = taken.clone();
                Box::pin(async move {
                    if silence.outlasts(known.age) {
                        return Ok(false);
                    }
                    if known.idle_for < FRESH {
                        return Ok(true);
                    }
                    silence
                        .within(ALIVE_WITHIN, connection.ping())
                        .await
                        .map(|()| true)
                })
            })
            .after_release(move |connection, known| {
                let silence = given_back.clone();
                Box::pin(async move {
                    if silence.outlasts(known.age) {
                        return Err(no_answer());
                    }
                    done(connection).await.map(|()| true)
                })
            })
    }

    /// Whether a connection of this age was there when another didn't answer.
    fn outlasts(&self, age: Duration) -> bool {
        self.last.borrow().is_some_and(|last| last.elapsed() < age)
    }
}

/// The pool would wait for it without an end.
async fn done(connection: &mut PgConnection) -> Result<(), Error> {
    timeout(DONE_WITHIN, connection.ping())
        .await
        .unwrap_or_else(|_| Err(no_answer()))
}

fn no_answer() -> Error {
    Error::Io(std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "the server didn't answer in time",
    ))
}
