//! Images in real files, for qemu to read too.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use formats::{Failure, Medium};

use super::driver::SlowSync;

pub struct FileMedium(File);

impl FileMedium {
    pub fn open(path: &Path, writable: bool) -> FileMedium {
        FileMedium(OpenOptions::new().read(true).write(writable).open(path).unwrap())
    }

    pub fn create(path: &Path) -> FileMedium {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path);
        FileMedium(file.unwrap())
    }
}

fn failure(error: std::io::Error) -> Failure {
    Failure::Io(error.raw_os_error().unwrap_or(0))
}

impl Medium for FileMedium {
    fn length_bytes(&mut self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn read(&mut self, offset_bytes: u64, bytes: &mut [u8]) -> Result<(), Failure> {
        let mut done = 0;
        while done < bytes.len() {
            let count = self.0.read_at(&mut bytes[done..], offset_bytes + done as u64).map_err(failure)?;
            if count == 0 {
                bytes[done..].fill(0);
                break;
            }
            done += count;
        }
        Ok(())
    }

    fn write(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        self.0.write_all_at(bytes, offset_bytes).map_err(failure)
    }

    fn zero(&mut self, offset_bytes: u64, length_bytes: u64) -> Result<(), Failure> {
        self.write(offset_bytes, &vec![0; length_bytes as usize])
    }

    fn set_length(&mut self, length_bytes: u64) -> Result<(), Failure> {
        self.0.set_len(length_bytes).map_err(failure)
    }

    fn sync(&mut self) -> Result<(), Failure> {
        // Nothing crashes here: a real sync would only take time.
        Ok(())
    }
}

impl SlowSync for FileMedium {}

/// A directory that goes away.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("vbdd-formats-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Whether qemu's tools are there.
pub fn has_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        println!("qemu-img is missing: skipped");
    }
    found
}

/// Runs a tool in a directory; its exit code and what it said.
pub fn tool(dir: &Scratch, name: &str, arguments: &[&str]) -> (i32, String) {
    let result = Command::new(name).args(arguments).current_dir(&dir.0).output().unwrap();
    let text = String::from_utf8_lossy(&result.stdout) + String::from_utf8_lossy(&result.stderr);
    (result.status.code().unwrap_or(-1), text.into_owned())
}

/// Runs a tool that must succeed.
pub fn run(dir: &Scratch, name: &str, arguments: &[&str]) -> String {
    let (code, text) = tool(dir, name, arguments);
    assert_eq!(code, 0, "{name} {}: {text}", arguments.join(" "));
    text
}
