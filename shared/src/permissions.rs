//! Who may read the files of a process.

use rustix::fs::Mode;

/// Makes every file, folder and socket that this process and its children create from now on accessible to this user
/// only, whatever the shell's umask is. Prompts, results and the database are nobody else's. Call it first in `main`.
pub fn private_files() {
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
}
