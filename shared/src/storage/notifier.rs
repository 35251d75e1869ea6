//! Tells other processes through PostgreSQL what was committed, after the commit.
//!
//! A transaction that notifies takes a lock of the whole server at its commit and holds it until it is on the disk, so
//! that all commits would queue behind one another. So one task of each process sends the notifications of many
//! transactions together, in a transaction that writes nothing. If the process dies between the commit and the
//! notification, those who wait find out when they look by themselves.

use super::Db;
use super::liveness::ConnectionLiveness;
use super::wakeups::CHANNEL;
use sqlx::PgPool;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// While there is much to tell it is told this often.
const SEND_INTERVAL: Duration = Duration::from_millis(5);

/// A notification holds less than 8,000 bytes.
const WORDS_AT_ONCE: usize = 180;

/// Gives words to the process's one task that sends them. On SQLite, where every process sees the commit itself, there
/// is none.
#[derive(Clone, Debug)]
pub(super) struct Notifier(Option<mpsc::UnboundedSender<Message>>);

#[derive(Debug)]
enum Message {
    Words(Vec<String>),
    Flush(oneshot::Sender<()>),
}

impl Notifier {
    pub(super) fn start(db: &Db, liveness: &Arc<ConnectionLiveness>) -> Self {
        let Db::Postgres(pool) = db else {
            return Self(None);
        };
        let (sender, inbox) = mpsc::unbounded_channel();
        tokio::spawn(send(pool.clone(), liveness.clone(), inbox));
        Self(Some(sender))
    }

    /// Sends these words soon.
    pub(super) fn notify(&self, words: Vec<String>) {
        if let Some(sender) = self.0.as_ref().filter(|_| !words.is_empty()) {
            let _ = sender.send(Message::Words(words));
        }
    }

    /// Waits until everything that was given before has been sent.
    pub(super) async fn flush(&self) {
        let Some(sender) = &self.0 else { return };
        let (done, sent) = oneshot::channel();
        if sender.send(Message::Flush(done)).is_ok() {
            let _ = sent.await;
        }
    }
}

/// Ends when the last store of the process is dropped.
async fn send(pool: PgPool, liveness: Arc<ConnectionLiveness>, mut inbox: mpsc::UnboundedReceiver<Message>) {
    while let Some(first) = inbox.recv().await {
        let (mut words, mut flushed) = (BTreeSet::new(), Vec::new());
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Words(more) => words.extend(more),
                Message::Flush(done) => flushed.push(done),
            }
            next = inbox.try_recv().ok();
        }
        let words: Vec<String> = words.into_iter().collect();
        for words in words.chunks(WORDS_AT_ONCE) {
            let notifying = sqlx::query("select pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(words.join(" "));
            // The wait for a connection says nothing about the database.
            let notified = async {
                let mut connection = pool.acquire().await?;
                liveness.in_time(notifying.execute(&mut *connection)).await
            };
            if let Err(error) = notified.await {
                tracing::debug!(%error, "notifications are lost; those who wait look by themselves");
            }
        }
        drop(flushed);
        tokio::time::sleep(SEND_INTERVAL).await;
    }
}
