//! What tests of the image tool share: directories, programs, random contents.
#![allow(dead_code, missing_docs, unreachable_pub)]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]
#![allow(clippy::cast_possible_truncation)]

use std::path::PathBuf;
use std::process::Command;

pub const MIB: u64 = 1 << 20;

/// A directory that goes away.
pub struct Scratch(pub PathBuf);

/// How a program ended, and what it said.
#[derive(Clone, Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Scratch {
    pub fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("vbdd-image-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn command(&self, words: &str) -> Command {
        let mut words = words.split_whitespace();
        let name = words.next().unwrap();
        let program = if name == "vbdd" { env!("CARGO_BIN_EXE_vbdd") } else { name };
        let mut command = Command::new(program);
        command.args(words).current_dir(&self.0);
        command
    }

    /// Runs a command line without quotes; `vbdd` is ours.
    pub fn run(&self, words: &str) -> Said {
        self.said(&mut self.command(words))
    }

    pub fn said(&self, command: &mut Command) -> Said {
        let result = command.output().unwrap_or_else(|error| {
            panic!("{command:?}: {error} (Debian: apt install qemu-utils)");
        });
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = Said {
            code: result.status.code().unwrap_or(-1),
            out: text(&result.stdout),
            err: text(&result.stderr),
        };
        assert!(!said.err.contains("panicked"), "{command:?}: {said:?}");
        said
    }

    /// Runs what must succeed; what it wrote to standard output.
    pub fn ok(&self, words: &str) -> String {
        let said = self.run(words);
        assert_eq!(said.code, 0, "{words}: {said:?}");
        said.out
    }

    /// `vbdd image`, which must succeed.
    pub fn image(&self, words: &str) -> String {
        self.ok(&format!("vbdd image {words}"))
    }

    /// `vbdd image`, which must fail: its exit code, and the one line that it said.
    pub fn refused(&self, words: &str) -> (i32, String) {
        let said = self.run(&format!("vbdd image {words}"));
        assert_ne!(said.code, 0, "{words}: {said:?}");
        assert_eq!(said.err.lines().count(), 1, "{words}: {said:?}");
        (said.code, said.err)
    }

    /// What qemu reads in an image.
    pub fn by_qemu(&self, format: &str, name: &str) -> Vec<u8> {
        self.ok(&format!("qemu-img convert -f {format} -O raw {name} by-qemu.raw"));
        let bytes = std::fs::read(self.path("by-qemu.raw")).unwrap();
        std::fs::remove_file(self.path("by-qemu.raw")).unwrap();
        bytes
    }

    /// What we read in an image.
    pub fn by_us(&self, format: &str, name: &str) -> Vec<u8> {
        self.image(&format!("convert {format}:{name} raw:by-us.raw"));
        let bytes = std::fs::read(self.path("by-us.raw")).unwrap();
        std::fs::remove_file(self.path("by-us.raw")).unwrap();
        bytes
    }

    /// Random writes, zeroes and discards by qemu. v2 refuses discards over a parent, which is its matter.
    pub fn fill(&self, format: &str, name: &str, size: u64, rng: &mut Rng) {
        let mut command = self.command("qemu-io");
        command.args(["-f", format]);
        for _ in 0..14 {
            let at = rng.below(size / 512) * 512;
            let length = ((1 + rng.below(300)) * 512).min(size - at);
            command.arg("-c").arg(match rng.below(8) {
                0 => format!("write -z {at} {length}"),
                1 => format!("write -z -u {at} {length}"),
                2 => format!("discard {at} {length}"),
                _ => format!("write -P {} {at} {length}", 1 + rng.below(250)),
            });
        }
        let said = self.said(command.arg(name));
        assert!(
            said.code == 0 || said.out.contains("discard failed") || said.err.contains("discard failed"),
            "{said:?}"
        );
    }

    /// Names of all files.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(&self.0)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Random numbers that a seed repeats (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len() as u64) as usize]
    }
}

/// The value of a field in a JSON object without nesting before it; quotes stay.
pub fn field<'a>(json: &'a str, key: &str) -> Option<&'a str> {
    let (_, rest) = json.split_once(&format!("\"{key}\": "))?;
    let end = if let Some(text) = rest.strip_prefix('"') {
        text.find('"')? + 2
    } else {
        rest.find([',', '}', '\n', ']'])?
    };
    Some(rest[..end].trim())
}

/// One stretch of a map, as far as two tools must agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub start: u64,
    pub length: u64,
    pub data: bool,
    pub present: bool,
    /// Of what is stored only.
    pub depth: Option<u64>,
    /// Of what is stored as it is.
    pub offset: Option<u64>,
}

/// Reads the output of `map --output=json`, ours or qemu's, and joins what goes on.
pub fn stretches(json: &str) -> Vec<Stretch> {
    let mut found: Vec<Stretch> = Vec::new();
    for object in json.split_inclusive('}').filter(|text| text.contains('{')) {
        let number = |key| field(object, key).and_then(|text| text.parse::<u64>().ok());
        let data = field(object, "data") == Some("true");
        let next = Stretch {
            start: number("start").unwrap(),
            length: number("length").unwrap(),
            data,
            present: field(object, "present") == Some("true"),
            depth: number("depth").filter(|_| data),
            offset: number("offset").filter(|_| data),
        };
        match found.last_mut() {
            Some(last)
                if (last.data, last.present, last.depth) == (next.data, next.present, next.depth)
                    && last.offset.map(|offset| offset + last.length) == next.offset =>
            {
                last.length += next.length;
            }
            _ => found.push(next),
        }
    }
    found
}

pub fn same(one: &[u8], other: &[u8], what: &str) {
    assert_eq!(one.len(), other.len(), "{what}: sizes");
    if let Some(at) = (0..one.len()).find(|at| one[*at] != other[*at]) {
        panic!("{what}: byte {at} differs: {} {}", one[at], other[at]);
    }
}

/// What a chain of VHDs (and a raw image at its end) shows, leaf first: read from Microsoft's specification, and from nothing of ours.
pub fn vhd_chain(dir: &Scratch, names: &[&str]) -> Vec<u8> {
    let files: Vec<Vec<u8>> = names.iter().map(|name| std::fs::read(dir.path(name)).unwrap()).collect();
    let be = |bytes: &[u8], at: usize, width: usize| {
        bytes[at..at + width].iter().fold(0, |sum, byte| sum << 8 | *byte as usize)
    };
    let size = be(&files[0], 48, 8);
    let sector = |at: usize| {
        for file in &files {
            if !file.starts_with(b"conectix") {
                return file.get(at * 512..at * 512 + 512);
            }
            let (kind, header) = (be(file, 60, 4), be(file, 16, 8));
            let (table, block) = (be(file, header + 16, 8), be(file, header + 32, 4) / 512);
            if at >= be(file, 48, 8) / 512 {
                return None;
            }
            let start = be(file, table + at / block * 4, 4);
            let bit = at % block;
            if start != 0xffff_ffff && file[start * 512 + bit / 8] << (bit % 8) & 0x80 != 0 {
                let from = (start + (block / 8).div_ceil(512) + bit) * 512;
                return file.get(from..from + 512);
            }
            if kind == 3 {
                return None;
            }
        }
        None
    };
    (0..size / 512).flat_map(|at| sector(at).map_or([0; 512], |found| found.try_into().unwrap())).collect()
}
