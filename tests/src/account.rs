//! The ordinary user that programs run as when the tests run as root: PostgreSQL demands one, and so does a worker.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid, chown};

/// A user of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// Its number.
    pub uid: u32,
    /// The number of its group.
    pub gid: u32,
}

impl Account {
    /// The user of the product's programs; none when the tests don't run as root: then it is the tests' own.
    pub fn of_product() -> Option<Self> {
        let account = is_root().then(|| Self::find("nobody"));
        account.map(|found| found.expect("every system has a user nobody"))
    }

    /// A user by its name.
    pub fn find(name: &str) -> Option<Self> {
        let users = fs::read_to_string("/etc/passwd").ok()?;
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then_some(())?;
            Some(Self {
                uid: fields.nth(1)?.parse().ok()?,
                gid: fields.next()?.parse().ok()?,
            })
        })
    }

    /// Gives a file or folder to this user.
    pub fn own(self, path: &Path) -> std::io::Result<()> {
        Ok(chown(
            path,
            Some(Uid::from_raw(self.uid)),
            Some(Gid::from_raw(self.gid)),
        )?)
    }

    /// Gives a folder with all that is in it to this user.
    pub fn own_all(self, folder: &Path) {
        let user = format!("{}:{}", self.uid, self.gid);
        let given = std::process::Command::new("chown")
            .args(["-R", &user])
            .arg(folder)
            .status();
        assert!(
            given.is_ok_and(|status| status.success()),
            "{} can't be given away",
            folder.display()
        );
    }

    /// What stands before a command line to have it run as this user.
    pub fn words(self) -> Vec<OsString> {
        let words = [
            "setpriv".to_owned(),
            format!("--reuid={}", self.uid),
            format!("--regid={}", self.gid),
            "--clear-groups".to_owned(),
            "--".to_owned(),
        ];
        words.map(Into::into).to_vec()
    }

    /// The same program where this user can start it: itself, or a copy in `folder`.
    pub fn reachable(self, program: PathBuf, folder: &Path) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let open =
            |path: &Path| fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & 0o005 == 0o005);
        if program
            .ancestors()
            .filter(|path| !path.as_os_str().is_empty())
            .all(open)
        {
            return program;
        }
        let copy = folder.join(program.file_name().expect("a program has a name"));
        if !copy.is_file() {
            // Renamed into place: nobody starts a part of it, and nobody finds it open for writing.
            let new = folder.join(format!("new-{}", uuid::Uuid::new_v4().simple()));
            fs::copy(&program, &new).expect("the program can be copied");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).expect("the copy is ours");
            fs::rename(new, &copy).expect("the copy is ours");
        }
        copy
    }
}

/// Whether the tests run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
