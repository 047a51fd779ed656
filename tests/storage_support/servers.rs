//! NBD servers that others have written, as processes of a test.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Directory;

/// A server at the socket `s` of a directory; killed at the end.
pub struct Server {
    child: Child,
    command: Vec<String>,
    socket: String,
}

impl Server {
    /// Starts one. In its arguments `SOCKET` stands for the socket, and `DIR` for the directory.
    pub fn new(directory: &Directory, command: &[&str]) -> Server {
        let socket = directory.path("s");
        let place = directory.0.to_str().unwrap();
        let fill = |word: &&str| word.replace("SOCKET", &socket).replace("DIR", place);
        let command: Vec<String> = command.iter().map(fill).collect();
        let child = start(&command, &socket);
        Server { child, command, socket }
    }

    /// nbdkit with a plugin and its arguments.
    pub fn nbdkit(directory: &Directory, arguments: &[&str]) -> Server {
        Server::new(directory, &[&["nbdkit", "-f", "-U", "SOCKET"], arguments].concat())
    }

    /// The way an image is named that lies there.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket)
    }

    /// Ends it as a power loss does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after it was killed.
    pub fn restart(&mut self) {
        self.child = start(&self.command, &self.socket);
    }

    /// Ends it as an operator does.
    pub fn terminate(mut self) {
        self.signal("-TERM");
        assert!(self.child.wait().unwrap().success());
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(command: &[String], socket: &str) -> Child {
    let _ = std::fs::remove_file(socket);
    let (tool, arguments) = command.split_first().unwrap();
    let started = Command::new(tool).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let mut child = started.unwrap_or_else(|error| {
        panic!("{tool}: {error}; the Debian packages qemu-utils, nbdkit and nbd-server are needed (tests/run installs them)")
    });
    let begin = Instant::now();
    while !Path::new(socket).exists() {
        assert!(child.try_wait().unwrap().is_none(), "{command:?} has ended");
        assert!(begin.elapsed() < Duration::from_secs(30), "{command:?} does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
    child
}
