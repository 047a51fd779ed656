//! Images with formats on NBD servers, served on by `vbdd nbd` and used by qemu.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

mod storage_support;

use std::process::Command;

use storage_support::servers::Server;
use storage_support::{Directory, pattern};

/// Runs a tool; what it says, which must be good.
fn run(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("60").arg(tool).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {arguments:?}: {text}");
    text.into_owned()
}

fn qemu_io(uri: &str, commands: &[&str]) {
    let mut arguments = vec!["-f", "raw", uri];
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("Pattern verification failed"), "{said}");
}

/// A server of the image, and a `vbdd nbd` that uses it.
struct Pair {
    below: Server,
    above: Server,
    directory: Directory,
    _inner: Directory,
    uri: String,
}

impl Pair {
    fn new(directory: Directory, format: &str) -> Pair {
        let below = Server::nbdkit(&directory, &["file", "DIR/image"]);
        let image = format!("{format}:{}", below.uri());
        let inner = Directory::new("/tmp", &format!("remote-{format}-above"));
        let command = [env!("CARGO_BIN_EXE_vbdd"), "nbd", &image, "--socket", "SOCKET"];
        let above = Server::new(&inner, &command);
        let uri = above.uri();
        Pair { below, above, directory, _inner: inner, uri }
    }
}

fn through_a_death(format: &str, qemu_format: &str, create: &[&str]) {
    let directory = Directory::new("/tmp", &format!("remote-{format}"));
    let image = directory.path("image");
    run("qemu-img", &[&["create", "-q", "-f", qemu_format][..], create, &[&image, "64M"]].concat());
    // An export does not grow: there must be room for all that may come.
    if format == "qcow2" {
        std::fs::File::options().write(true).open(&image).unwrap().set_len(80 << 20).unwrap();
    }
    let mut pair = Pair::new(directory, format);
    qemu_io(&pair.uri, &["write -P 5 0 1M", "write -P 6 10M 64k", "flush", "write -P 7 20M 3M"]);
    pair.below.kill();
    let reader = std::thread::spawn({
        let uri = pair.uri.clone();
        move || qemu_io(&uri, &["read -P 7 20M 3M", "write -P 8 30M 512", "read -P 8 30M 512", "flush"])
    });
    std::thread::sleep(std::time::Duration::from_millis(300));
    pair.below.restart();
    reader.join().unwrap();
    qemu_io(&pair.uri, &["read -P 5 0 1M", "read -P 6 10M 64k", "read -P 0 1M 9M", "discard 0 64k", "flush"]);
    pair.above.terminate();
    drop(pair.below);
    let image = pair.directory.path("image");
    let reads = ["read -P 5 64k 960k", "read -P 6 10M 64k", "read -P 7 20M 3M", "read -P 8 30M 512"];
    let mut arguments = vec!["-r", "-f", qemu_format, image.as_str()];
    reads.iter().for_each(|command| arguments.extend(["-c", command]));
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("Pattern verification failed"), "{said}");
    if qemu_format == "qcow2" {
        run("qemu-img", &["check", "-q", &image]);
    }
}

#[test]
fn qcow2_on_a_server_that_dies() {
    through_a_death("qcow2", "qcow2", &[]);
}

#[test]
fn fixed_vhd_on_a_server_that_dies() {
    through_a_death("vhd", "vpc", &["-o", "subformat=fixed,force_size=on"]);
}

#[test]
fn an_image_does_not_name_servers() {
    let directory = Directory::new("/tmp", "remote-parent");
    let base = directory.file("base", &pattern(1 << 20, 3));
    let image = directory.path("image");
    for name in ["nbd+unix:///?socket=/tmp/s", "nbd://localhost/x", &base] {
        run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", &image, "1M"]);
        let path = format!("qcow2:{image}");
        let output = Command::new("timeout")
            .args(["1", env!("CARGO_BIN_EXE_vbdd"), "nbd", &path, "--socket", &directory.path("t")])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        // A parent that is a path is served until the time is over.
        assert_eq!(said.contains("protocol"), name != base, "{name}: {said}");
    }
}
