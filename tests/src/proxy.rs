//! The way to a PostgreSQL database over TCP. It can fall silent as a network does: nothing gets through any more, and
//! nobody is told. It can lose the answer to a commit, and it can be slow.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use crate::database::Database;

/// What becomes of the connections.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// How often all connections fell silent for good.
    silences: u32,
    /// Whether new ones are silent too.
    deaf: bool,
    /// Whether the answer to the next commit is lost, and its connection with it.
    loses_commit: bool,
}

/// A proxy before one database; it ends with the test's runtime.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    state: watch::Sender<State>,
}

impl Proxy {
    /// Stands before this PostgreSQL database.
    pub async fn before(database: &Database) -> Self {
        Self::slowly_before(database, Duration::ZERO).await
    }

    /// The same, and each way takes this long.
    pub async fn slowly_before(database: &Database, latency: Duration) -> Self {
        let (path, folder) = database
            .url()
            .split_once("?host=")
            .expect("a socket of the kit's");
        let name = path.rsplit('/').next().unwrap_or_default();
        let socket = PathBuf::from(folder).join(".s.PGSQL.5432");
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let state = watch::Sender::default();
        let shared: watch::Sender<State> = state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, socket.clone(), shared.clone(), latency));
            }
        });
        Self {
            url: format!("postgres://postgres@127.0.0.1:{port}/{name}?sslmode=disable"),
            state,
        }
    }

    /// What a process gets as `DATABASE_URL` to go this way.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// No connection brings anything any more, and none is closed. New ones work.
    pub fn swallow(&self) {
        self.state.send_modify(|state| state.silences += 1);
    }

    /// The same, and new connections are accepted and never answered, until [`Proxy::recover`].
    pub fn swallow_all(&self) {
        self.state.send_modify(|state| {
            state.silences += 1;
            state.deaf = true;
        });
    }

    /// The next commit succeeds, and whoever made it isn't told: the connection is closed instead.
    pub fn lose_next_commit(&self) {
        self.state.send_modify(|state| state.loses_commit = true);
    }

    /// New connections work again.
    pub fn recover(&self) {
        self.state.send_modify(|state| state.deaf = false);
    }
}

async fn carry(mut client: TcpStream, socket: PathBuf, state: watch::Sender<State>, latency: Duration) {
    let mut changes = state.subscribe();
    let born = *changes.borrow_and_update();
    let Ok(mut server) = UnixStream::connect(socket).await else {
        return;
    };
    let _ = client.set_nodelay(true);
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let loses_commit = || state.send_if_modified(|state| std::mem::take(&mut state.loses_commit));
    let lost = watch::Sender::new(false);
    let lose = |sent: &[u8]| {
        if contains(sent, b"COMMIT\0") && loses_commit() {
            lost.send_replace(true);
        }
        true
    };
    // What the server says to a commit that is to be lost isn't passed on; it has committed then.
    let keep = |answered: &[u8]| !(*lost.borrow() && contains(answered, b"COMMIT\0"));
    let silent = changes.wait_for(|now| born.deaf || now.silences > born.silences);
    tokio::select! {
        _ = pass(from_client, to_server, latency, lose) => return,
        _ = pass(from_server, to_client, latency, keep) => return,
        _ = silent => {}
    }
    // Both ends stay open.
    std::future::pending::<()>().await;
}

/// Passes on what is read, `latency` later, until the end or until `may` forbids it.
async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    latency: Duration,
    may: impl Fn(&[u8]) -> bool,
) -> io::Result<()> {
    let (sender, mut received) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    let reading = async move {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = from.read(&mut buffer).await?;
            if count == 0 || !may(&buffer[..count]) {
                return Ok(());
            }
            // The receiver lives as long as this.
            let _ = sender.send((Instant::now() + latency, buffer[..count].to_vec()));
        }
    };
    let writing = async move {
        while let Some((at, bytes)) = received.recv().await {
            if !latency.is_zero() {
                sleep_until(at).await;
            }
            to.write_all(&bytes).await?;
        }
        Ok(())
    };
    let done: (io::Result<()>, io::Result<()>) = tokio::join!(reading, writing);
    done.0.and(done.1)
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}
