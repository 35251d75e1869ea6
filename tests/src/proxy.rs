//! The way to a PostgreSQL database over TCP, which can fall silent as a network does: nothing gets through any more, and
//! nobody is told.

use std::path::PathBuf;

use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

use crate::database::Database;

/// What becomes of the connections.
#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// How often all connections fell silent for good.
    silences: u32,
    /// Whether new ones are silent too.
    deaf: bool,
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
        let (path, folder) = database
            .url()
            .split_once("?host=")
            .expect("a socket of the kit's");
        let name = path.rsplit('/').next().unwrap_or_default();
        let socket = PathBuf::from(folder).join(".s.PGSQL.5432");
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
        let port = listener.local_addr().expect("it is bound").port();
        let state = watch::Sender::default();
        let changes = state.subscribe();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(carry(client, socket.clone(), changes.clone()));
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

    /// New connections work again.
    pub fn recover(&self) {
        self.state.send_modify(|state| state.deaf = false);
    }
}

async fn carry(mut client: TcpStream, socket: PathBuf, mut changes: watch::Receiver<State>) {
    let born = *changes.borrow_and_update();
    let Ok(mut server) = UnixStream::connect(socket).await else {
        return;
    };
    let silent = changes.wait_for(|now| born.deaf || now.silences > born.silences);
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
        _ = silent => {}
    }
    // Both ends stay open.
    std::future::pending::<()>().await;
}
