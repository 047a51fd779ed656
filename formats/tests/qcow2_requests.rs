//! Random requests on random chains: what reads find, and what qemu says of the image afterwards.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::print_stdout)]

mod support;

use formats::Medium;
use formats::qcow2::Planted;
use support::driver::NoFaults;
use support::rng::{Rng, seeds};
use support::world::{Setup, World};

fn qemu_check(bytes: &[u8], name: &str) {
    let dir = std::env::temp_dir().join(format!("vbdd-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("parent"), [0; 512]).unwrap();
    let path = dir.join("leaf.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let result = std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output();
    let Ok(result) = result else {
        println!("qemu-img is missing: not asked");
        return;
    };
    let text = String::from_utf8_lossy(&result.stdout) + String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{name}: {text}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn reads_find_what_was_written_and_closing_leaves_no_leak() {
    let (mut checked, mut told) = (0, 0);
    for seed in seeds(60) {
        println!("VBDD_SEED={seed}");
        let mut rng = Rng::new(seed);
        let setup = Setup::random(&mut rng);
        let depth = setup.depth;
        println!("{setup:?}");
        let mut world = World::new(seed, setup, Planted::default());
        for _ in 0..300 {
            while (world.all.requests.len() as u64) < depth {
                world.ask();
            }
            world.all.step(&mut NoFaults);
        }
        world.all.drain();
        world.all.read_all();
        world.all.driver.close().unwrap();
        assert_eq!(world.all.driver.disk.stalls, 0);
        checked += world.all.reads_checked;
        told += world.all.zeroes_told;
        if seed % 4 == 0 || std::env::var("VBDD_SEED").is_ok() {
            let leaf = world.all.driver.media.get_mut(&0).unwrap();
            let mut bytes = vec![0; usize::try_from(leaf.length_bytes()).unwrap()];
            leaf.read(0, &mut bytes).unwrap();
            qemu_check(&bytes, &format!("requests-{seed}"));
        }
    }
    println!("{checked} sectors read and compared, {told} said to be nowhere");
    assert!(told > 0 || std::env::var("VBDD_SEED").is_ok());
}
