//! Outlives a test binary by a moment: waits until standard input ends, which is when the test binary ends in
//! whatever way, then ends every process that belongs to the folder given and removes the folder.

use std::io::Read as _;
use std::path::PathBuf;

fn main() {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return;
    };
    // A session of its own: an interrupt from the terminal must not end the reaper before its work.
    let _ = rustix::process::setsid();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    tests::paths::clear(&folder);
}
