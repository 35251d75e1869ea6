//! Which files a run has changed: the workspace is looked at before and after it. The looks are bounded in number and in
//! bytes, and so is what is told, because the agent can make any number of files of any size.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::files::{Error, Found, Owner, Workspace};
use shared::key::hex;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::Path;

/// How many entries of a workspace are looked at. Of a larger one nothing is told.
const MAX_ENTRIES: usize = 20_000;
/// How many changed files are told, and how many bytes their paths have together.
const MAX_TOLD: usize = 1_000;
const MAX_TOLD_BYTES: usize = 256 * 1024;
/// The largest file whose digest is taken, and the sum of all that are read for that, in bytes.
const MAX_DIGESTED: u64 = 16 * 1024 * 1024;
const MAX_DIGESTED_TOGETHER: u64 = 128 * 1024 * 1024;

/// The files of a workspace at one time; `None` if there are too many, or they can't be looked at.
#[derive(Debug, Default)]
pub(super) struct Before(Option<BTreeMap<String, Found>>);

impl Before {
    /// A workspace that no run was in.
    pub(super) fn empty() -> Self {
        Self(Some(BTreeMap::new()))
    }

    /// The workspace as it is. No process of a run may be alive in it.
    pub(super) async fn of(data_dir: &Path, owner: Owner) -> Self {
        let data_dir = data_dir.to_owned();
        let looked = tokio::task::spawn_blocking(move || files(&data_dir, owner).map(|(_, files)| files));
        Self(looked.await.ok().flatten())
    }
}

/// What a run has changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Changes {
    /// `{path, status, size, digest}` of each, by path; `None` when that isn't known.
    pub(super) files: Option<Vec<Value>>,
    /// Whether there are more than are told.
    pub(super) truncated: bool,
}

impl Changes {
    /// What is different from `before` in the workspace, now that the run has ended.
    pub(super) async fn since(before: Before, data_dir: &Path, owner: Owner) -> Self {
        let data_dir = data_dir.to_owned();
        let looked = tokio::task::spawn_blocking(move || compare(before, &data_dir, owner));
        looked.await.ok().flatten().unwrap_or_default()
    }
}

fn files(data_dir: &Path, owner: Owner) -> Option<(Workspace, BTreeMap<String, Found>)> {
    let workspace = Workspace::open(data_dir, owner).ok()??;
    let (files, truncated) = workspace.files(MAX_ENTRIES).ok()?;
    let files = files.into_iter().map(|found| (found.path.clone(), found));
    (!truncated).then(|| (workspace, files.collect()))
}

fn compare(before: Before, data_dir: &Path, owner: Owner) -> Option<Changes> {
    let mut before = before.0?;
    let (workspace, after) = files(data_dir, owner)?;
    let mut told = Told::default();
    let mut left = MAX_DIGESTED_TOGETHER;
    for (path, found) in after {
        let status = match before.remove(&path) {
            Some(known) if known == found => continue,
            Some(_) => "modified",
            None => "created",
        };
        if !told.takes(&path) {
            continue;
        }
        let digest = (found.size <= MAX_DIGESTED.min(left)).then(|| digest(&workspace, &found));
        if digest.is_some() {
            left -= found.size;
        }
        let digest = digest.and_then(Result::ok);
        told.add(json!({ "path": path, "status": status, "size": found.size, "digest": digest }));
    }
    for path in before.into_keys() {
        if told.takes(&path) {
            told.add(json!({ "path": path, "status": "deleted", "size": null, "digest": null }));
        }
    }
    let mut files = told.files;
    files.sort_by(|one, other| one["path"].as_str().cmp(&other["path"].as_str()));
    Some(Changes {
        files: Some(files),
        truncated: told.truncated,
    })
}

#[derive(Default)]
struct Told {
    files: Vec<Value>,
    bytes: usize,
    truncated: bool,
}

impl Told {
    fn takes(&mut self, path: &str) -> bool {
        let takes = self.files.len() < MAX_TOLD && self.bytes + path.len() <= MAX_TOLD_BYTES;
        self.truncated |= !takes;
        takes
    }

    fn add(&mut self, file: Value) {
        self.bytes += file["path"].as_str().map_or(0, str::len);
        self.files.push(file);
    }
}

/// `sha256:` and 64 hex digits.
fn digest(workspace: &Workspace, found: &Found) -> Result<String, Error> {
    let mut content = workspace.open_found(found)?.file.take(found.size);
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => hash.update(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(format!("sha256:{}", hex(&hash.finalize())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn workspace() -> (tempfile::TempDir, Owner, std::path::PathBuf) {
        let data = tempfile::tempdir().unwrap();
        let owner = Owner::Job(shared::id::JobId::new());
        let folder = data.path().join(owner.directories().join("/")).join("workspace");
        fs::create_dir_all(&folder).unwrap();
        (data, owner, folder)
    }

    fn told(changes: &Changes) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let files = changes.files.as_ref().unwrap();
        files
            .iter()
            .map(|file| (text(&file["path"]), text(&file["status"])))
            .collect()
    }

    #[tokio::test]
    async fn what_is_new_changed_or_gone_is_told() {
        let (data, owner, folder) = workspace();
        let at = |name: &str| folder.join(name);
        for name in ["changed", "gone", "kept", "rewritten"] {
            fs::write(at(name), "old").unwrap();
        }
        fs::create_dir(at(".git")).unwrap();
        let before = Before::of(data.path(), owner).await;

        fs::write(at("changed"), "longer").unwrap();
        fs::remove_file(at("gone")).unwrap();
        fs::write(at(".git/index"), "x").unwrap();
        fs::create_dir(at("new")).unwrap();
        fs::write(at("new/file"), "abc").unwrap();
        // Same size, and its time of change set back: the agent can't hide that.
        let times = fs::metadata(at("rewritten")).unwrap().modified().unwrap();
        fs::write(at("rewritten"), "new").unwrap();
        fs::File::options()
            .write(true)
            .open(at("rewritten"))
            .unwrap()
            .set_modified(times)
            .unwrap();
        let changes = Changes::since(before, data.path(), owner).await;

        let expected = [
            ("changed", "modified"),
            ("gone", "deleted"),
            ("new/file", "created"),
            ("rewritten", "modified"),
        ];
        assert_eq!(
            told(&changes),
            expected.map(|(path, status)| (path.to_owned(), status.to_owned()))
        );
        let files = changes.files.unwrap();
        assert_eq!(files[2]["size"], 3);
        assert_eq!(
            files[2]["digest"],
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!((&files[1]["digest"], changes.truncated), (&Value::Null, false));
    }

    #[tokio::test]
    async fn what_is_told_and_read_is_bounded() {
        let (data, owner, folder) = workspace();
        for number in 0..=MAX_TOLD {
            fs::write(folder.join(format!("{number:04}")), "").unwrap();
        }
        let huge = fs::File::create(folder.join("0000")).unwrap();
        huge.set_len(1 << 40).unwrap();

        let changes = Changes::since(Before::empty(), data.path(), owner).await;

        let files = changes.files.unwrap();
        assert_eq!((files.len(), changes.truncated), (MAX_TOLD, true));
        assert_eq!(
            (&files[0]["size"], &files[0]["digest"]),
            (&json!(1_u64 << 40), &Value::Null)
        );
        assert!(files[1]["digest"].is_string());
        assert_eq!(Changes::since(Before(None), data.path(), owner).await.files, None);
    }
}
