//! How much a process asks of its database: every statement is a round trip, every transaction a wait for the disk.

use super::Store;
use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Statements, those outside of transactions included, without `begin` and `commit`. What the queue library asks by
    /// itself isn't counted.
    pub statements: u64,
    /// Transactions that were begun.
    pub transactions: u64,
}

impl Sub for Work {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            statements: self.statements - earlier.statements,
            transactions: self.transactions - earlier.transactions,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    statements: AtomicU64,
    transactions: AtomicU64,
}

impl Counters {
    pub(super) fn statement(&self) {
        self.statements.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn transaction(&self) {
        self.transactions.fetch_add(1, Ordering::Relaxed);
    }
}

impl Store {
    /// What this process has asked of the database since it opened it.
    pub fn work(&self) -> Work {
        Work {
            statements: self.work.statements.load(Ordering::Relaxed),
            transactions: self.work.transactions.load(Ordering::Relaxed),
        }
    }
}
