//! Event streams that are open, of keys that may only have so many: counted in the database, over all processes.

use shared::id::KeyId;
use shared::storage::{self, Store};
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use uuid::Uuid;

/// A stream that isn't renewed for this long counts no more: its process is gone.
const STREAM_TTL: Duration = Duration::from_secs(30);

/// The streams that clients of this process hold.
type Open = Arc<Mutex<HashSet<Uuid>>>;

/// The streams of this process.
pub struct Streams {
    store: Store,
    process_id: Uuid,
    open: Open,
    closing: UnboundedSender<Uuid>,
    closed: Mutex<Option<UnboundedReceiver<Uuid>>>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Streams")
    }
}

/// Counts for one open stream; dropping it makes room for another.
#[derive(Debug)]
pub struct StreamPermit {
    stream_id: Uuid,
    open: Open,
    closing: UnboundedSender<Uuid>,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        ids(&self.open).remove(&self.stream_id);
        // Without a receiver the process is ending, and the stream stops counting by itself.
        let _ = self.closing.send(self.stream_id);
    }
}

impl Streams {
    /// Streams that are counted in this database.
    pub fn new(store: Store) -> Self {
        let (closing, closed) = unbounded_channel();
        Self {
            store,
            process_id: Uuid::new_v4(),
            open: Arc::default(),
            closing,
            closed: Mutex::new(Some(closed)),
        }
    }

    /// Counts one more stream of this key, of which `max` may be open; `None` when they are.
    pub async fn enter(&self, key_id: &KeyId, max: i64) -> storage::Result<Option<StreamPermit>> {
        let now = self.store.limits_now().await?;
        let stream_id = self
            .store
            .open_stream(key_id, self.process_id, max, now, now.plus(STREAM_TTL))
            .await?;
        Ok(stream_id.map(|stream_id| {
            ids(&self.open).insert(stream_id);
            StreamPermit {
                stream_id,
                open: Arc::clone(&self.open),
                closing: self.closing.clone(),
            }
        }))
    }

    /// The streams that are closed, for the task that writes it down; `None` when one has them already.
    pub fn take_closed(&self) -> Option<UnboundedReceiver<Uuid>> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Lets the open ones count on.
    pub async fn renew(&self) -> storage::Result<()> {
        let open: Vec<Uuid> = ids(&self.open).iter().copied().collect();
        if open.is_empty() {
            return Ok(());
        }
        let valid_until = self.store.limits_now().await?.plus(STREAM_TTL);
        for stream_id in open {
            self.store.renew_stream(stream_id, valid_until).await?;
        }
        Ok(())
    }
}

fn ids(open: &Open) -> MutexGuard<'_, HashSet<Uuid>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}
