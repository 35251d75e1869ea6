//! Detects dead connections to PostgreSQL. TCP reports a vanished peer (a firewall that forgot the connection, a machine
//! without power) only after about 15 minutes, so every statement has a time limit on this side. A connection that gave
//! no answer isn't used again, nor is any that was open at that time.
//!
//! Migrations have no time limit: they may take long, and a process that starts can wait.

use sqlx::postgres::{PgConnection, PgPoolOptions};
use sqlx::{Connection, Error};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::timeout;

/// How long a statement may take. The server itself gives up waiting for a lock after half of that.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the check of an idle connection may take.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection that was idle for less than this is used without a check.
const PING_IF_IDLE_FOR: Duration = Duration::from_millis(500);

/// How long a connection that is given back may take to end its last statement.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long after that a connection on which no transaction began is back in the pool at the latest. If it takes longer, the
/// next one fails to begin on it, too, and is tried again.
const GIVING_BACK: Duration = Duration::from_secs(1);

/// When a connection of this process last gave no answer.
#[derive(Debug, Default)]
pub(super) struct ConnectionLiveness {
    last: watch::Sender<Option<Instant>>,
    /// When a statement was last abandoned before its answer, because nobody waited for it any more.
    abandoned: Mutex<Option<Instant>>,
    /// When a transaction last failed to begin, or nobody waited for that any more. What is locked together with `begin` may
    /// not be had in time, and then the library gives the connection back within the transaction, where all statements fail.
    unbegun: Mutex<Option<Instant>>,
}

/// Notes a statement that is dropped before its answer.
struct Waiting<'a> {
    liveness: &'a ConnectionLiveness,
    answered: bool,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.answered {
            *self.liveness.abandoned() = Some(Instant::now());
        }
    }
}

/// Notes a transaction that doesn't begin.
struct Beginning<'a> {
    liveness: &'a ConnectionLiveness,
    begun: bool,
}

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        if !self.begun {
            let mut unbegun = self
                .liveness
                .unbegun
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            *unbegun = Some(Instant::now());
        }
    }
}

impl ConnectionLiveness {
    /// Waits for the answer to a statement, for so long as one may take. What is given up is dropped, and its
    /// connection with it.
    pub(super) fn in_time<T, E: From<Error>>(
        &self,
        statement: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T, E>> {
        self.within(STATEMENT_TIMEOUT, statement)
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
            let mut waiting = Waiting {
                liveness: self,
                answered: false,
            };
            let answer = answer.await;
            waiting.answered = true;
            match answer {
                Ok(answered) => answered,
                Err(_) => {
                    self.last.send_replace(Some(Instant::now()));
                    Err(no_answer().into())
                }
            }
        }
    }

    /// Waits until a connection of this process gives no answer.
    pub(super) async fn lost(&self) {
        // The sender lives as long as this.
        let _ = self.last.subscribe().changed().await;
    }

    /// Keeps dead connections out of a pool: each is checked before it is used, unless it was used just before, and
    /// before it is kept.
    pub(super) fn watch(self: &Arc<Self>, pool: PgPoolOptions) -> PgPoolOptions {
        let (taken, given_back) = (self.clone(), self.clone());
        pool.test_before_acquire(false)
            .before_acquire(move |connection, known| {
                let liveness = taken.clone();
                Box::pin(async move {
                    if liveness.is_suspect(known.age) || liveness.may_be_in_transaction(known.idle_for) {
                        return Ok(false);
                    }
                    if known.idle_for < PING_IF_IDLE_FOR {
                        return Ok(true);
                    }
                    liveness
                        .within(PING_TIMEOUT, connection.ping())
                        .await
                        .map(|()| true)
                })
            })
            .after_release(move |connection, known| {
                let liveness = given_back.clone();
                Box::pin(async move {
                    if liveness.is_suspect(known.age) {
                        return Err(no_answer());
                    }
                    // The pool asks the same, but would wait for the answer without a limit.
                    if liveness.may_be_busy() {
                        done(connection).await?;
                    }
                    Ok(true)
                })
            })
    }

    /// Waits until a transaction has begun, as [`Self::in_time`] does.
    pub(super) fn begun<T, E: From<Error>>(
        &self,
        begin: impl Future<Output = Result<T, E>>,
    ) -> impl Future<Output = Result<T, E>> {
        let answer = self.in_time(begin);
        async move {
            let mut beginning = Beginning {
                liveness: self,
                begun: false,
            };
            let answer = answer.await;
            beginning.begun = answer.is_ok();
            answer
        }
    }

    /// Whether a connection of the pool may be in a transaction that failed to begin: it was given back before that was
    /// noted, or just after.
    fn may_be_in_transaction(&self, idle_for: Duration) -> bool {
        let unbegun = *self.unbegun.lock().unwrap_or_else(PoisonError::into_inner);
        unbegun.is_some_and(|at| idle_for + GIVING_BACK >= at.elapsed())
    }

    /// Whether a connection that is given back may still be in a statement.
    fn may_be_busy(&self) -> bool {
        self.abandoned()
            .is_some_and(|at| at.elapsed() < STATEMENT_TIMEOUT)
    }

    fn abandoned(&self) -> MutexGuard<'_, Option<Instant>> {
        self.abandoned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a connection of this age was open when another gave no answer.
    fn is_suspect(&self, age: Duration) -> bool {
        self.last.borrow().is_some_and(|last| last.elapsed() < age)
    }
}

async fn done(connection: &mut PgConnection) -> Result<(), Error> {
    timeout(RELEASE_TIMEOUT, connection.ping())
        .await
        .unwrap_or_else(|_| Err(no_answer()))
}

fn no_answer() -> Error {
    Error::Io(std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "the server didn't answer in time",
    ))
}
