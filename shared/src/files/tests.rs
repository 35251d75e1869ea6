use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

/// A folder as `DATA_DIR`, a session in it, and its workspace.
fn data() -> (tempfile::TempDir, Owner, PathBuf) {
    let data = tempfile::tempdir().unwrap();
    let owner = Owner::Session(SessionId::new());
    let [kind, id] = owner.directories();
    let workspace = data.path().join(kind).join(id).join(WORKSPACE);
    fs::create_dir_all(&workspace).unwrap();
    fs::write(data.path().join("secret"), "secret").unwrap();
    (data, owner, workspace)
}

fn path(text: &str) -> FilePath {
    FilePath::parse(text).unwrap()
}

fn content(workspace: &Workspace, at: &str) -> Result<String> {
    let mut text = String::new();
    workspace.open_file(&path(at))?.file.read_to_string(&mut text)?;
    Ok(text)
}

fn upload(data: &Path, owner: Owner, at: &str, text: &str) -> Result<()> {
    let mut upload = Upload::begin(data, owner)?;
    upload.file.write_all(text.as_bytes())?;
    upload.place(&path(at))
}

#[test]
fn links_are_followed_inside_the_workspace_and_never_out_of_it() {
    let (data, owner, folder) = data();
    fs::create_dir(folder.join("inner")).unwrap();
    fs::write(folder.join("inner/file"), "inside").unwrap();
    symlink("inner", folder.join("there")).unwrap();
    symlink("inner/file", folder.join("latest")).unwrap();
    symlink(data.path().join("secret"), folder.join("absolute")).unwrap();
    symlink("../../../secret", folder.join("relative")).unwrap();
    symlink(data.path(), folder.join("out")).unwrap();
    symlink("loop", folder.join("loop")).unwrap();
    let workspace = Workspace::open(data.path(), owner).unwrap().unwrap();

    for at in ["inner/file", "there/file", "latest"] {
        assert_eq!(content(&workspace, at).unwrap(), "inside", "{at}");
    }
    for at in ["absolute", "relative", "out/secret", "loop"] {
        let refused = content(&workspace, at).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)), "{at}: {refused:?}");
    }
    let refused = upload(data.path(), owner, "out/new", "x").unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused:?}");
    assert!(!data.path().join("new").exists());
    let refused = workspace.remove(&path("out/secret")).unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused:?}");

    let listing = workspace.list(None, true, 0, 100).unwrap();
    let listed = listing
        .entries
        .iter()
        .map(|entry| (entry.path.as_str(), entry.kind));
    assert_eq!(
        listed.collect::<Vec<_>>(),
        [
            ("inner", EntryKind::Directory),
            ("inner/file", EntryKind::File),
            ("latest", EntryKind::File),
            ("there", EntryKind::Directory),
        ]
    );
    // A link is replaced and removed, not what it leads to.
    upload(data.path(), owner, "absolute", "new").unwrap();
    assert_eq!(content(&workspace, "absolute").unwrap(), "new");
    workspace.remove(&path("relative")).unwrap();
    assert_eq!(fs::read_to_string(data.path().join("secret")).unwrap(), "secret");
}

#[test]
fn a_workspace_that_is_a_link_is_none() {
    let (data, owner, folder) = data();
    fs::remove_dir(&folder).unwrap();
    symlink(data.path(), &folder).unwrap();

    assert!(Workspace::open(data.path(), owner).is_err());
    assert!(upload(data.path(), owner, "new", "x").is_err());
    assert!(!data.path().join("new").exists());
}

#[test]
fn what_is_no_regular_file_neither_hangs_nor_is_read() {
    let (data, owner, folder) = data();
    let fifo = std::ffi::CString::new(folder.join("fifo").to_str().unwrap()).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(folder.join("socket")).unwrap();
    symlink("/dev/zero", folder.join("zero")).unwrap();
    fs::create_dir(folder.join("directory")).unwrap();
    let workspace = Workspace::open(data.path(), owner).unwrap().unwrap();

    for at in ["fifo", "socket", "zero", "directory"] {
        let refused = workspace.open_file(&path(at)).unwrap_err();
        assert!(matches!(refused, Error::Refused(_)), "{at}: {refused:?}");
    }
    assert_eq!(workspace.list(None, true, 0, 100).unwrap().total, 1);
    assert_eq!(workspace.files(MAX_ENTRIES).unwrap().0, []);
}

#[test]
fn an_upload_appears_whole_or_not_at_all() {
    let (data, owner, folder) = data();
    fs::write(folder.join("old"), "old").unwrap();
    fs::hard_link(folder.join("old"), data.path().join("kept")).unwrap();
    fs::write(folder.join("file"), "").unwrap();

    upload(data.path(), owner, "old", "new").unwrap();
    upload(data.path(), owner, "a/b/c.txt", "deep").unwrap();
    drop(Upload::begin(data.path(), owner).unwrap());
    for at in ["a", "file/inner"] {
        let refused = upload(data.path(), owner, at, "x").unwrap_err();
        assert!(matches!(refused, Error::Refused(_)), "{at}: {refused:?}");
    }

    assert_eq!(fs::read_to_string(folder.join("old")).unwrap(), "new");
    assert_eq!(
        fs::read_to_string(data.path().join("kept")).unwrap(),
        "old",
        "its other name"
    );
    assert_eq!(fs::read_to_string(folder.join("a/b/c.txt")).unwrap(), "deep");
    assert_eq!(
        fs::read_dir(folder.parent().unwrap().join(UPLOADS))
            .unwrap()
            .count(),
        0
    );
    // A job that hasn't run has no workspace yet.
    let other = Owner::Job(JobId::new());
    assert!(Workspace::open(data.path(), other).unwrap().is_none());
    upload(data.path(), other, "first", "x").unwrap();
    assert!(Workspace::open(data.path(), other).unwrap().is_some());
}

#[test]
fn a_path_that_changes_while_it_is_used_leads_nowhere_else() {
    let (data, owner, folder) = data();
    fs::create_dir(folder.join("real")).unwrap();
    fs::write(folder.join("real/secret"), "mine").unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let agent = std::thread::spawn({
        let (over, folder, outside) = (over.clone(), folder.clone(), data.path().to_owned());
        move || {
            while !over.load(Ordering::Relaxed) {
                let _ = fs::remove_file(folder.join("swap"));
                let _ = symlink(&outside, folder.join("swap"));
                let _ = fs::remove_file(folder.join("swap"));
                let _ = symlink("real", folder.join("swap"));
            }
        }
    });
    let workspace = Workspace::open(data.path(), owner).unwrap().unwrap();
    for _ in 0..2_000 {
        if let Ok(text) = content(&workspace, "swap/secret") {
            assert_eq!(text, "mine");
        }
        let _ = workspace.list(Some(&path("swap")), true, 0, 10);
        let _ = workspace.remove(&path("swap/kept"));
    }
    for _ in 0..100 {
        let _ = upload(data.path(), owner, "swap/escaped", "x");
    }
    over.store(true, Ordering::Relaxed);
    agent.join().unwrap();

    assert_eq!(fs::read_to_string(data.path().join("secret")).unwrap(), "secret");
    assert!(!data.path().join("escaped").exists());
}

#[test]
fn walks_are_bounded_and_show_what_has_a_path() {
    let (data, owner, folder) = data();
    for name in [".hidden", "line\nbreak", "plain", "back\\slash"] {
        fs::write(folder.join(name), "x").unwrap();
    }
    fs::create_dir(folder.join(".git")).unwrap();
    fs::write(folder.join(".git/config"), "x").unwrap();
    let workspace = Workspace::open(data.path(), owner).unwrap().unwrap();
    let listing = workspace.list(None, true, 0, 10).unwrap();
    assert_eq!((listing.total, listing.truncated), (1, false));
    assert_eq!(listing.entries[0].size, Some(1));
    let (files, _) = workspace.files(MAX_ENTRIES).unwrap();
    let paths = files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>();
    assert_eq!(paths, [".hidden", "back\\slash", "plain"]);

    let mut deep = folder.clone();
    for _ in 0..70 {
        deep.push("d");
        fs::create_dir(&deep).unwrap();
    }
    let listing = workspace.list(None, true, 0, 100).unwrap();
    assert_eq!((listing.total, listing.truncated), (65, true));
    let page = workspace.list(None, true, 64, 100).unwrap();
    assert_eq!(page.entries.len(), 1);
    assert_eq!(page.entries[0].path, "plain");

    for number in 0..MAX_ENTRIES {
        fs::write(folder.join(number.to_string()), "").unwrap();
    }
    let listing = workspace.list(None, false, 0, 1).unwrap();
    assert!(listing.truncated && listing.total <= MAX_ENTRIES);
}
