//! Images that grow and drives whose medium is changed, under a guest that uses them.

use vbdd::vbd::{Event, Geometry, Timer};

use crate::host::{BE, DRIVER, FE, Host};

fn resize(host: &mut Host, sectors: u64) {
    host.geometry.sectors = sectors;
    host.give(Event::Resized(host.geometry));
    host.run();
}

#[test]
fn a_disk_that_grows_or_shrinks_is_told_of_in_one_transaction() {
    let mut host = Host::connected(DRIVER);
    for sectors in [4096, 1024, 0] {
        resize(&mut host, sectors);
        assert_eq!(host.took(), "4");
        let last = host.last.as_ref().unwrap();
        assert_eq!(last.written("sectors"), Some(sectors.to_string().as_str()));
        assert_eq!(last.writes.last().unwrap(), &("state", "4".to_owned()));
    }
    resize(&mut host, 0);
    assert_eq!(host.took(), "", "no change");
}

#[test]
fn a_disk_that_grows_before_it_is_connected_is_told_of_with_4() {
    let mut host = crate::host::ready();
    resize(&mut host, 4096);
    assert_eq!(host.took(), "");
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, 4");
    assert_eq!(host.be("sectors"), Some("4096"));
}

#[test]
fn a_disk_that_grows_while_it_is_unplugged_says_nothing() {
    let mut host = Host::connected(DRIVER);
    host.unplug();
    resize(&mut host, 4096);
    assert_eq!(host.took(), "");
}

/// A drive of a guest that uses it.
fn drive(params: &str) -> Host {
    let mut host = Host::new(DRIVER);
    host.put(BE, "device-type", "cdrom");
    host.put(BE, "mode", "r");
    host.put(BE, "params", params);
    host.run().fire(Timer::Settle);
    host.ring(8, 9).fe(3).fe(4);
    host.took();
    host
}

fn change(host: &mut Host, params: &str, sectors: u64) -> String {
    host.geometry.sectors = sectors;
    host.put(BE, "params", params);
    host.run();
    host.took()
}

#[test]
fn an_empty_drive_is_connected_and_has_no_sectors() {
    let mut host = Host::new(DRIVER);
    host.put(BE, "device-type", "cdrom");
    host.put(BE, "params", "");
    host.geometry = Geometry { sectors: 0, ..host.geometry };
    host.run().fire(Timer::Settle);
    assert_eq!((host.took().as_str(), host.be("hotplug-status")), ("open  ro, 2", Some("connected")));
    host.ring(8, 9).fe(3);
    assert_eq!(host.took(), "connect [8]/9, 4");
    assert_eq!((host.be("sectors"), host.be("info")), (Some("0"), Some("5")));
}

#[test]
fn media_are_changed_in_every_spelling() {
    let mut host = drive("/isos/a");
    // libxl: the bare path, and another type; xenopsd: a path, or a slash before the same one.
    host.put(BE, "type", "qdisk");
    assert_eq!(
        change(&mut host, "/isos/b", 4096),
        "handover, close, open /isos/b ro, connect [8]/9 resume, 4"
    );
    assert_eq!(host.be("sectors"), Some("4096"));
    assert_eq!(
        change(&mut host, "//isos/b", 4096),
        "handover, close, open //isos/b ro, connect [8]/9 resume, 4",
        "of the same size, and told of again"
    );
    assert_eq!(change(&mut host, "", 0), "handover, close, open  ro, connect [8]/9 resume, 4");
    assert_eq!(host.be("sectors"), Some("0"));
    assert_eq!(
        change(&mut host, "raw:/isos/a", 2048),
        "handover, close, open /isos/a ro, connect [8]/9 resume, 4"
    );
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "");
}

#[test]
fn a_medium_that_cannot_be_put_in_leaves_an_empty_drive_and_a_word() {
    let mut host = drive("/isos/a");
    host.hold = vec!["Open(OpenRequest { image: Image { format: Raw, path: \"\""];
    host.open_error = Some("/isos/b: does not exist".into());
    assert_eq!(change(&mut host, "/isos/b", 0), "handover, close, open /isos/b ro");
    host.hold.clear();
    host.open_error = None;
    host.run();
    assert_eq!(host.took(), "open  ro, connect [8]/9 resume, 4, note");
    assert_eq!((host.state(), host.be("error")), (4, Some("/isos/b: does not exist")));
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "", "not tried again by itself");
    assert_eq!(
        change(&mut host, "//isos/b", 64),
        "handover, close, open //isos/b ro, connect [8]/9 resume, 4"
    );
    assert_eq!((host.be("sectors"), host.be("error")), (Some("64"), None));
}

#[test]
fn what_names_no_medium_changes_nothing() {
    let mut host = drive("/isos/a");
    for params in ["nbd:unix:/run/s", "isos/b", "/isos/../etc/shadow"] {
        assert_eq!(change(&mut host, params, 2048), "");
    }
}

#[test]
fn only_a_cdrom_changes_under_its_guest() {
    let mut host = Host::connected(DRIVER);
    assert_eq!(change(&mut host, "/dev/vg/b", 2048), "");
    host.put(BE, "device-type", "cdrom");
    host.run();
    assert_eq!(host.took(), "", "it was no drive when it was opened");
}

#[test]
fn a_guest_that_leaves_in_the_middle_of_a_change_is_let_go() {
    for state in [1, 3, 5, 6] {
        for held in ["Open", "CloseImage", "Disconnect", "Connect"] {
            let mut host = drive("/isos/a");
            host.hold = vec![held];
            change(&mut host, "/isos/b", 2048);
            host.fe(state);
            host.hold.clear();
            host.run();
            let expected = match state {
                1 => 2,
                3 => 4,
                other => other,
            };
            assert_eq!(host.state(), expected, "{held} {state}: {:?}", host.log);
        }
    }
}

#[test]
fn an_unplug_in_the_middle_of_a_change_is_an_unplug() {
    for held in ["Open", "CloseImage", "Disconnect", "Connect"] {
        let mut host = drive("/isos/a");
        host.hold = vec![held];
        change(&mut host, "/isos/b", 2048);
        host.unplug();
        host.hold.clear();
        host.run();
        host.fe(5).fe(6);
        assert_eq!(host.state(), 6, "{held}: {:?}", host.log);
    }
}

#[test]
fn a_process_that_ends_in_the_middle_of_a_change_leaves_the_rest_to_the_next() {
    for held in ["Open", "CloseImage", "Disconnect", "Connect"] {
        let mut host = drive("/isos/a");
        host.hold = vec![held];
        change(&mut host, "/isos/b", 4096);
        host.hold.clear();
        host.killed();
        host.run();
        assert!(host.took().ends_with("open /isos/b ro, connect [8]/9 resume, 4"));
        assert_eq!(host.be("sectors"), Some("4096"));
        host.put(FE, "state", "4");
        host.run();
        assert_eq!(host.took(), "");
    }
}
