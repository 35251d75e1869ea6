//! What a test may use. [`system`] starts the real binaries on a fresh [`database`], behind a [`proxy`], or on a small
//! [`disk`]; [`client`] speaks HTTP to them; [`script`] tells the scripted CLI what to do, and [`trace`] what its runs did. [`paths`] and [`processes`] see to it
//! that nothing is left behind, [`account`] that nothing runs as root.

pub mod account;
pub mod client;
pub mod database;
pub mod disk;
pub mod gateway;
pub mod paths;
pub mod pooler;
pub mod processes;
pub mod proxy;
pub mod receiver;
pub mod script;
pub mod system;
pub mod trace;

use std::cell::RefCell;
use std::sync::Once;
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

/// What a machine that is busy with other things may add to the time of something. Tighter limits would fail there; how
/// fast things are is for `make bench` to measure.
pub const BUSY: Duration = Duration::from_secs(30);

/// How long a case may take before it counts as stuck.
const CASE_LIMIT: Duration = Duration::from_mins(5);

/// Permits of all cases that may run at once; one that must be alone takes all of them.
const ALL: u32 = 1_000;
static CASES: Semaphore = Semaphore::const_new(ALL as usize);

/// Runs one case of a test with a deadline, in a runtime of its own.
pub fn run(case: impl Future<Output = ()>) {
    run_with(1, CASE_LIMIT, case);
}

/// Runs a case while no other one runs: it would disturb them, or they it.
pub fn run_alone(limit: Duration, case: impl Future<Output = ()>) {
    run_with(ALL, limit, case);
}

fn run_with(permits: u32, limit: Duration, case: impl Future<Output = ()>) {
    let _repeats = RepeatsPanic::new();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let _permit = CASES
            .acquire_many(permits)
            .await
            .expect("the semaphore is never closed");
        let mut case = std::pin::pin!(case);
        // The case is still alive when this panics, so that its systems see a panic and show their logs.
        assert!(
            tokio::time::timeout(limit, &mut case).await.is_ok(),
            "the case is stuck after {limit:?}"
        );
    });
}

thread_local! {
    /// What the last panic of this thread said, and where.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Says at the end of a failed case once more what failed: its systems have shown their logs after the first time.
struct RepeatsPanic;

impl RepeatsPanic {
    fn new() -> Self {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let tell = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                PANIC.set(panic.to_string());
                tell(panic);
            }));
        });
        Self
    }
}

impl Drop for RepeatsPanic {
    #[expect(
        clippy::print_stderr,
        reason = "the test harness shows it with the failed test only"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- what failed: {}", PANIC.take());
        }
    }
}

/// Makes two tests, `<name>::on_sqlite` and `<name>::on_postgres`, of each function that takes a
/// [`Db`](database::Db).
#[macro_export]
macro_rules! both {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn on_sqlite() {
                $crate::run(super::$name($crate::database::Db::Sqlite));
            }

            #[test]
            fn on_postgres() {
                $crate::run(super::$name($crate::database::Db::Postgres));
            }
        }
    )+};
}

/// Makes a test of each async function that takes nothing: for what has nothing to do with the database.
#[macro_export]
macro_rules! once {
    ($($name:ident),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn once() {
                $crate::run(super::$name());
            }
        }
    )+};
}

/// Asks again and again until there is an answer; fails when there is none within `limit`.
pub async fn eventually<T>(limit: Duration, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begin.elapsed() < limit, "within {limit:?} there was not: {what}");
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}
