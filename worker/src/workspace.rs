//! The directories of a run. Workspace and home, under `DATA_DIR`, stay. Sockets and temporary files, in a runtime
//! directory with a short path, are removed with the run. Their content isn't trusted when it is removed: links aren't
//! followed, and directories of any depth, name or mode are removed.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use shared::files::{Owner, WORKSPACE};
use shared::id::{JobId, SessionId};
use uuid::Uuid;

use crate::account::may_write;

/// The directories of a session, or of a job without a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    root: PathBuf,
    /// The agent's working directory.
    pub workspace: PathBuf,
    /// The agent's home, with the CLI's sessions in `.claude`.
    pub home: PathBuf,
}

impl Folders {
    /// `DATA_DIR/jobs/<job>`. `data_dir` should be absolute.
    pub fn of_job(data_dir: &Path, job: &JobId) -> Self {
        Self::at(data_dir, Owner::Job(*job))
    }

    /// `DATA_DIR/sessions/<session>`. `data_dir` should be absolute.
    pub fn of_session(data_dir: &Path, session: &SessionId) -> Self {
        Self::at(data_dir, Owner::Session(*session))
    }

    fn at(data_dir: &Path, owner: Owner) -> Self {
        let root = data_dir.join(owner.directories().join("/"));
        Self {
            workspace: root.join(WORKSPACE),
            home: root.join("home"),
            root,
        }
    }

    /// The same with another working directory, which isn't removed with them.
    #[must_use]
    pub fn working_in(self, workspace: PathBuf) -> Self {
        Self { workspace, ..self }
    }

    /// Creates the directories, for this user only. Existing ones stay, and can be entered after this.
    pub async fn create(&self) -> io::Result<()> {
        let folders = self.clone();
        // A network disk may not respond.
        tokio::task::spawn_blocking(move || folders.make())
            .await
            .map_err(io::Error::other)?
    }

    fn make(&self) -> io::Result<()> {
        for folder in [&self.workspace, &self.home] {
            private_directory(folder)?;
            // An earlier run may have taken its own rights away; then no other could start here.
            if fs::metadata(folder)?.permissions().mode() & 0o700 != 0o700 {
                fs::set_permissions(folder, Permissions::from_mode(0o700))?;
            }
        }
        Ok(())
    }

    /// Removes the directories with their content. No process of the run may be alive. Missing directories are no error,
    /// and an interrupted removal is continued.
    pub async fn remove(&self) -> io::Result<()> {
        let root = self.root.clone();
        tokio::task::spawn_blocking(move || remove_tree(&root))
            .await
            .map_err(io::Error::other)?
    }

    /// Removes what a run has filled the disk with. A session keeps its home, which has the conversation.
    pub async fn remove_for_disk(&self, is_session: bool) -> io::Result<()> {
        if !is_session {
            return self.remove().await;
        }
        let workspace = self.workspace.clone();
        tokio::task::spawn_blocking(move || remove_tree(&workspace))
            .await
            .map_err(io::Error::other)?
    }

    /// The transcript of a Claude session in this home, if the CLI has written one. The name of its directory depends on
    /// the agent's working directory; the name of the file doesn't.
    pub async fn transcript(&self, claude_session: Uuid) -> io::Result<Option<PathBuf>> {
        let home = self.home.clone();
        tokio::task::spawn_blocking(move || find_transcript(&home, claude_session))
            .await
            .map_err(io::Error::other)?
    }
}

fn find_transcript(home: &Path, claude_session: Uuid) -> io::Result<Option<PathBuf>> {
    let projects = home.join(".claude/projects");
    let entries = match fs::read_dir(&projects) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let real_home = fs::canonicalize(home)?;
    for entry in entries {
        let file = entry?.path().join(format!("{claude_session}.jsonl"));
        // The agent could have created a link there to a file that isn't its own.
        if let Ok(real) = fs::canonicalize(&file)
            && real.starts_with(&real_home)
            && real.is_file()
        {
            return Ok(Some(real));
        }
    }
    Ok(None)
}

fn private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Removes a directory without recursion: each directory in it is first moved into one directory beside it. So a tree
/// of any depth needs one open directory and short paths. A directory without permissions gets them first. Several
/// callers may remove the same directory at once.
fn remove_tree(root: &Path) -> io::Result<()> {
    let mut gathered = Gathered::beside(root);
    match fs::symlink_metadata(root) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !gathered.path.exists() => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_dir() => return gone(fs::remove_file(root)),
        Ok(_) => {
            private_directory(&gathered.path)?;
            gathered.take(root)?;
        }
    }
    loop {
        let mut found = false;
        for entry in entries(&gathered.path)? {
            found = true;
            gathered.empty(&entry?.path())?;
        }
        if !found {
            match gone(fs::remove_dir(&gathered.path)) {
                // Another caller has moved more into it.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                removed => return removed,
            }
        }
    }
}

/// The directory in which the directories of a tree are collected for removal.
struct Gathered {
    path: PathBuf,
    /// The prefix of names that this removal uses; other removals use their own.
    own: Uuid,
    next: u64,
}

impl Gathered {
    fn beside(root: &Path) -> Self {
        let mut path = root.as_os_str().to_owned();
        path.push(".removed");
        Self {
            path: PathBuf::from(path),
            own: Uuid::new_v4(),
            next: 0,
        }
    }

    /// Moves a directory here.
    fn take(&mut self, directory: &Path) -> io::Result<()> {
        gone(fs::set_permissions(directory, Permissions::from_mode(0o700)))?;
        let name = format!("{}-{}", self.own.simple(), self.next);
        self.next += 1;
        gone(fs::rename(directory, self.path.join(name)))
    }

    /// Removes a directory's files, moves its directories here, and then removes it.
    fn empty(&mut self, directory: &Path) -> io::Result<()> {
        for entry in entries(directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                self.take(&entry.path())?;
            } else {
                gone(fs::remove_file(entry.path()))?;
            }
        }
        gone(fs::remove_dir(directory))
    }
}

/// The entries of a directory; empty if it doesn't exist.
fn entries(directory: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>> + use<>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        entries => Ok(Some(entries?).into_iter().flatten()),
    }
}

/// Treats a missing file as removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The maximum length of the path of a runtime directory, so that the paths of a run's sockets fit into 107 bytes.
const MAX_RUNTIME_PATH: usize = 80;

/// The number of tries to create a runtime directory: a process that starts at the same time may remove it as a
/// leftover.
const TRIES: u32 = 10;

/// The runtime directory of this process. It is locked while the process lives, so that other processes (and the
/// system's cleaning of `/tmp`) see that it is in use. It is removed when this value is dropped.
#[derive(Debug)]
pub struct Runtime {
    path: PathBuf,
    _lock: File,
    runs: AtomicU64,
}

impl Runtime {
    /// Creates `<base>/claude-queue-<pid>-<8 hex digits>` and removes those of processes that have ended. `base` is
    /// `XDG_RUNTIME_DIR`, or `/tmp` if it is unset, not a directory of this user's, or too long. Fails if the directory can't be created
    /// or locked.
    pub fn create(base: Option<&Path>) -> io::Result<Self> {
        let fits = |base: &&Path| {
            base.is_absolute()
                && base.is_dir()
                && base.as_os_str().len() + 34 <= MAX_RUNTIME_PATH
                && may_write(base)
        };
        let base = base.filter(fits).unwrap_or(Path::new("/tmp"));
        remove_leftovers(base);
        let mut made = Self::make(base);
        for _ in 1..TRIES {
            if made.is_ok() {
                break;
            }
            made = Self::make(base);
        }
        made
    }

    fn make(base: &Path) -> io::Result<Self> {
        let random = &Uuid::new_v4().simple().to_string()[..8];
        let path = base.join(format!("claude-queue-{}-{random}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path)?;
        let locked =
            File::open(&path).and_then(|lock| lock.try_lock().map(|()| lock).map_err(io::Error::from));
        match locked {
            Ok(lock) if path.is_dir() => Ok(Self {
                path,
                _lock: lock,
                runs: AtomicU64::new(0),
            }),
            Ok(_) => Err(io::ErrorKind::NotFound.into()),
            Err(error) => {
                let _ = fs::remove_dir(&path);
                Err(error)
            }
        }
    }

    /// Its path, absolute and at most 80 bytes long.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates the directory of one run.
    pub fn run(&self) -> io::Result<RunDir> {
        let number = self.runs.fetch_add(1, Ordering::Relaxed);
        let run = RunDir {
            path: self.path.join(number.to_string()),
        };
        private_directory(&run.tmp())?;
        Ok(run)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let _ = remove_tree(&self.path);
    }
}

/// The runtime directory of one run; removed when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
}

impl RunDir {
    /// Its path, for the guard's socket and the files of this run.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket of the run's gateway.
    pub fn gateway_socket(&self) -> PathBuf {
        self.path.join("gateway.sock")
    }

    /// The directory for temporary files of a run without a sandbox.
    pub fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }

    /// Removes it, with everything that a run without a sandbox left in its temporary directory. Doesn't block other
    /// tasks.
    pub async fn remove(self) {
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // Anything that can't be removed now is removed with the runtime directory.
        let _ = remove_tree(&self.path);
    }
}

/// Removes the runtime directories of this user that no process has locked.
fn remove_leftovers(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    let user = rustix::process::geteuid().as_raw();
    for entry in entries.flatten() {
        let ours = entry.file_name().to_str().is_some_and(is_runtime_name)
            && entry
                .metadata()
                .is_ok_and(|meta| meta.is_dir() && meta.uid() == user);
        if ours
            && let Ok(directory) = File::open(entry.path())
            && directory.try_lock().is_ok()
        {
            let _ = remove_tree(&entry.path());
        }
    }
}

fn is_runtime_name(name: &str) -> bool {
    let name = name.strip_suffix(".removed").unwrap_or(name);
    let Some((pid, random)) = name
        .strip_prefix("claude-queue-")
        .and_then(|rest| rest.split_once('-'))
    else {
        return false;
    };
    !pid.is_empty()
        && pid.bytes().all(|byte| byte.is_ascii_digit())
        && random.len() == 8
        && random.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn job_folders(data: &Path) -> Folders {
        let folders = Folders::of_job(data, &JobId::new());
        folders.make().unwrap();
        folders
    }

    #[test]
    fn a_job_gets_directories_that_only_this_user_can_enter() {
        let data = tempfile::tempdir().unwrap();

        let folders = job_folders(data.path());

        for directory in [
            &folders.workspace,
            &folders.home,
            &data.path().join("jobs").clone(),
        ] {
            assert_eq!(
                fs::metadata(directory).unwrap().permissions().mode() & 0o777,
                0o700,
                "{directory:?}"
            );
        }
        folders.make().unwrap();
    }

    #[tokio::test]
    async fn directories_without_rights_get_them_back() {
        let data = tempfile::tempdir().unwrap();
        let folders = job_folders(data.path());
        for folder in [&folders.workspace, &folders.home] {
            fs::set_permissions(folder, Permissions::from_mode(0o000)).unwrap();
        }

        folders.create().await.unwrap();

        for folder in [&folders.workspace, &folders.home] {
            assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
        }
    }

    #[tokio::test]
    async fn removal_follows_no_link_and_is_stopped_by_no_mode() {
        let data = tempfile::tempdir().unwrap();
        let folders = job_folders(data.path());
        let outside = data.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "x").unwrap();
        symlink(&outside, folders.workspace.join("link")).unwrap();
        let locked = folders.workspace.join("locked/deeper");
        fs::create_dir_all(&locked).unwrap();
        fs::write(locked.join("file"), "x").unwrap();
        fs::set_permissions(&locked, Permissions::from_mode(0o000)).unwrap();

        folders.remove().await.unwrap();
        folders.remove().await.unwrap();

        assert!(outside.join("kept").exists());
        assert_eq!(fs::read_dir(data.path().join("jobs")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_tree_deeper_than_any_path_is_removed() {
        let data = tempfile::tempdir().unwrap();
        let folders = job_folders(data.path());
        // Built from the bottom, since no path reaches it: 3,000 levels, 200 bytes a name.
        let name = "d".repeat(200);
        for _ in 0..3000 {
            let above = folders.home.join("above");
            fs::create_dir(&above).unwrap();
            if folders.home.join("top").exists() {
                fs::rename(folders.home.join("top"), above.join(&name)).unwrap();
            }
            fs::rename(above, folders.home.join("top")).unwrap();
        }

        folders.remove().await.unwrap();

        assert_eq!(fs::read_dir(data.path().join("jobs")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_removal_that_was_cut_short_is_finished() {
        let data = tempfile::tempdir().unwrap();
        let folders = job_folders(data.path());
        let gathered = PathBuf::from(format!("{}.removed", folders.root.display()));
        fs::create_dir_all(gathered.join("0/inner")).unwrap();

        folders.remove().await.unwrap();

        assert!(!gathered.exists() && !folders.root.exists());
    }

    #[tokio::test]
    async fn a_transcript_is_found_wherever_the_agent_worked_unless_it_is_a_link_out() {
        let data = tempfile::tempdir().unwrap();
        let folders = job_folders(data.path());
        let (written, linked, missing) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
        let project = folders.home.join(".claude/projects/-workspace");
        fs::create_dir_all(&project).unwrap();
        fs::write(project.join(format!("{written}.jsonl")), "{}\n").unwrap();
        fs::write(data.path().join("secret"), "x").unwrap();
        symlink(
            data.path().join("secret"),
            project.join(format!("{linked}.jsonl")),
        )
        .unwrap();

        assert!(folders.transcript(written).await.unwrap().is_some());
        assert_eq!(folders.transcript(linked).await.unwrap(), None);
        assert_eq!(folders.transcript(missing).await.unwrap(), None);
    }

    #[test]
    fn the_runtime_directory_goes_with_its_owner_and_leftovers_go_at_the_next_start() {
        let base = tempfile::tempdir_in("/tmp").unwrap();
        let leftover = base.path().join("claude-queue-1-0123abcd");
        let strange = base.path().join("claude-queue-test-0123abcd");
        fs::create_dir_all(leftover.join("0/tmp")).unwrap();
        fs::create_dir(&strange).unwrap();

        let first = Runtime::create(Some(base.path())).unwrap();
        let second = Runtime::create(Some(base.path())).unwrap();
        let run = second.run().unwrap();

        assert!(!leftover.exists() && strange.exists());
        assert!(first.path().exists() && run.tmp().is_dir());
        assert!(run.gateway_socket().as_os_str().len() <= 107);
        drop(run);
        drop((first, second));
        assert_eq!(fs::read_dir(base.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_base_that_is_too_long_or_missing_is_replaced_by_tmp() {
        let base = tempfile::tempdir().unwrap();
        let long = base.path().join("x".repeat(90));
        fs::create_dir(&long).unwrap();
        let missing = base.path().join("missing");

        for base in [Some(long.as_path()), Some(missing.as_path()), None] {
            assert!(Runtime::create(base).unwrap().path().starts_with("/tmp"));
        }
    }
}
