//! The user that a worker runs as. The sandbox of a worker that is root is weaker than any other: root inside it is root
//! outside, so a run could change settings and devices of the machine. So root only prepares the folders, and then
//! becomes the ordinary user that `WORKER_USER` names.

use rustix::fs::{Access, access, chown};
use rustix::process::{DumpableBehavior, Gid, Uid, set_dumpable_behavior};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use shared::env::{Error, Vars};
use shared::storage::DatabaseUrl;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// The variable that names the user.
const VARIABLE: &str = "WORKER_USER";

const ACCEPTED: &str =
    "the name of an ordinary user of this machine (useradd --system claude-queue makes one)";

/// An ordinary user of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
    home: String,
}

/// Makes this process the user that it is to run as, and gives that user these folders ([`folders`]) where they are new.
/// Call it before the first thread starts. Fails if the process is root, is to run jobs in the sandbox, and `WORKER_USER`
/// names nobody.
pub fn become_ordinary(vars: &mut Vars, folders: &[(&'static str, PathBuf)]) -> Result<(), Error> {
    let wanted = vars.text(VARIABLE)?;
    let own = rustix::process::geteuid();
    let Some(name) = wanted else {
        let runs_jobs = vars
            .list("WORKER_QUEUES", "jobs,webhooks")?
            .iter()
            .any(|queue| queue == "jobs");
        return if runs_jobs && vars.flag("SANDBOX_ENABLED", true)? {
            refuse_root()
        } else {
            Ok(())
        };
    };
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let Some(account) = find(&users, &name) else {
        return Err(Error::new(
            VARIABLE,
            "names nobody that /etc/passwd knows",
            ACCEPTED,
        ));
    };
    if account.uid == 0 {
        return Err(Error::new(VARIABLE, "names root", ACCEPTED));
    }
    if own.as_raw() == account.uid {
        return Ok(());
    }
    if !own.is_root() {
        let problem =
            "names another user than the one that started this process, and only root can become another";
        return Err(Error::new(
            VARIABLE,
            problem,
            "the user that starts it, or nothing",
        ));
    }
    for (variable, folder) in folders {
        hand_over(folder, &account).map_err(|error| {
            Error::new(
                variable,
                format!("({}) {error}", folder.display()),
                "a folder of WORKER_USER",
            )
        })?;
    }
    leave_root(&account)
        .map_err(|error| Error::new(VARIABLE, format!("can't be taken on: {error}"), ACCEPTED))?;
    vars.replace("HOME", &account.home);
    Ok(())
}

/// Keeps the memory and the environment of this process, where its credentials are, from other processes of the same user:
/// an agent without the sandbox is one. Root can still look. Programs that this process starts aren't affected.
pub fn private_memory() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}

/// Fails if this process is root, whose runs the sandbox wouldn't keep from the machine.
pub fn refuse_root() -> Result<(), Error> {
    if rustix::process::geteuid().is_root() {
        let problem =
            "isn't set, and this worker is root: its runs could change settings of the whole machine";
        let accepted = format!("{ACCEPTED}; or start the worker as an ordinary user");
        return Err(Error::new(VARIABLE, problem, accepted));
    }
    Ok(())
}

/// The folders that the worker writes into, with the variable that names each.
pub fn folders(vars: &Vars) -> Result<Vec<(&'static str, PathBuf)>, Error> {
    let mut folders = vec![(
        "DATA_DIR",
        vars.resolve("DATA_DIR", vars.or("DATA_DIR", "./data")?.into()),
    )];
    if let DatabaseUrl::Sqlite(file) = DatabaseUrl::from_vars(vars)?
        && let Some(folder) = file.parent()
    {
        folders.push(("DATABASE_URL", folder.to_owned()));
    }
    Ok(folders)
}

/// Makes a folder for the user, or gives an empty one to it. What is in a folder stays whose it is: a run may have made
/// it, so root doesn't touch it.
fn hand_over(folder: &Path, account: &Account) -> io::Result<()> {
    if folder.as_os_str().is_empty() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    if fs::metadata(folder)?.uid() == account.uid {
        return Ok(());
    }
    if fs::read_dir(folder)?.next().is_some() {
        let name = &account.name;
        return Err(io::Error::other(format!(
            "belongs to another user and isn't empty: chown -R {name} gives it to {name}"
        )));
    }
    Ok(chown(
        folder,
        Some(Uid::from_raw(account.uid)),
        Some(Gid::from_raw(account.gid)),
    )?)
}

/// The system keeps these identities for each thread, so there must be one thread only.
fn leave_root(account: &Account) -> io::Result<()> {
    let threads = fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(io::Error::other(format!("{threads} threads run already")));
    }
    let (uid, gid) = (Uid::from_raw(account.uid), Gid::from_raw(account.gid));
    set_thread_groups(&[gid])?;
    set_thread_res_gid(gid, gid, gid)?;
    set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Whether this user may make files in a folder: one that root's environment names may be root's.
pub(crate) fn may_write(folder: &Path) -> bool {
    access(folder, Access::WRITE_OK | Access::EXEC_OK).is_ok()
}

fn find(passwd: &str, name: &str) -> Option<Account> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [user, _, uid, gid, _, home, ..] = fields[..] else {
            return None;
        };
        (user == name).then_some(())?;
        Some(Account {
            name: user.to_owned(),
            uid: uid.parse().ok()?,
            gid: gid.parse().ok()?,
            home: home.to_owned(),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        broken:x\n\
        claude:x:998:997::/var/lib/claude:/usr/sbin/nologin\n";

    #[test]
    fn a_user_is_found_by_its_name() {
        let found = find(PASSWD, "claude").unwrap();

        assert_eq!(
            (found.uid, found.gid, &*found.home),
            (998, 997, "/var/lib/claude")
        );
        for name in ["clau", "", "broken", "998"] {
            assert_eq!(find(PASSWD, name), None, "{name}");
        }
    }

    #[test]
    fn what_is_in_a_folder_of_another_user_stays_whose_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let own = fs::metadata(folder.path()).unwrap().uid();
        let account = Account {
            name: "claude".to_owned(),
            uid: own + 1,
            gid: own + 1,
            home: "/".to_owned(),
        };
        fs::write(folder.path().join("file"), "").unwrap();

        let refused = hand_over(folder.path(), &account).unwrap_err();

        assert!(refused.to_string().contains("chown -R claude"), "{refused}");
        hand_over(folder.path(), &Account { uid: own, ..account }).unwrap();
    }

    #[test]
    fn a_user_that_there_is_not_is_refused() {
        for (name, problem) in [("no-such-user", "nobody"), ("root", "names root")] {
            let refused = become_ordinary(&mut Vars::of([("WORKER_USER", name)]), &[]).unwrap_err();

            assert_eq!(refused.variable, "WORKER_USER");
            assert!(refused.problem.contains(problem), "{refused}");
        }
    }
}
