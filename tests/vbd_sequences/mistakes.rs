//! What toolstacks and hosts get wrong.

use vbdd::vbd::Timer;

use crate::host::{BE, DRIVER, Host, ready};

#[test]
fn an_image_that_cannot_be_opened() {
    let mut host = Host::new(DRIVER);
    host.open_error = Some("/dev/vg/a: no such file: create it".into());
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, 6");
    for name in ["error", "hotplug-error"] {
        assert_eq!(host.be(name), Some("/dev/vg/a: no such file: create it"));
    }
    assert_eq!(host.be("hotplug-status"), Some("error"));
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "");
    host.unplug().fire(Timer::Linger);
    assert_eq!(host.took(), "6, remove, forget");
}

#[test]
fn what_fails_is_not_tried_for_ever_whatever_the_frontend_shows() {
    for state in 0..9 {
        let mut host = Host::new(DRIVER);
        host.open_error = Some("no such file".into());
        host.fe(state);
        assert_eq!(host.took(), "open /dev/vg/a, 6", "frontend in {state}");
    }
}

#[test]
fn an_error_text_is_bounded_and_one_line() {
    let mut host = Host::new(DRIVER);
    host.open_error = Some(format!("a\nb{}", "é".repeat(5000)));
    host.run();
    let text = host.be("error").unwrap();
    assert!(text.len() <= 250 && text.starts_with("a bé"), "{text}");
}

#[test]
fn nodes_of_the_toolstack_that_make_no_sense() {
    for (name, value, says) in [
        ("frontend", "/local/domain/8/device/vbd/51712", "frontend"),
        ("frontend", "/local/domain/7/device/vbd/51713", "frontend"),
        ("frontend-id", "8", "frontend-id"),
        ("params", "qcow:/a", "qcow"),
        ("params", "", "no medium"),
        ("params", "../a", "absolute"),
        ("mode", "x", "mode"),
        ("mode", "", "mode"),
    ] {
        let mut host = Host::new(DRIVER);
        host.put(BE, name, value);
        host.run();
        assert_eq!(host.took(), "6", "{name} {value}");
        assert!(host.be("error").unwrap().contains(says), "{name}: {:?}", host.be("error"));
        host.put(BE, "frontend", "/local/domain/7/device/vbd/51712");
        host.put(BE, "frontend-id", "7");
        host.put(BE, "params", "/dev/vg/a");
        host.put(BE, "mode", "w");
        host.run();
        assert_eq!(
            (host.took().as_str(), host.be("error")),
            ("open /dev/vg/a, 2", None),
            "once it is put right"
        );
        assert_eq!((host.be("hotplug-status"), host.be("hotplug-error")), (Some("connected"), None));
    }
}

#[test]
fn a_device_of_another_specification_is_left_alone() {
    let mut host = Host::new(DRIVER);
    host.put(BE, "specification", "virtio");
    host.run();
    assert_eq!((host.took().as_str(), host.state()), ("forget", 1));
}

#[test]
fn modes_and_device_types() {
    for (mode, device_type, removable, info, open) in [
        ("w", "disk", "0", "0", "open /dev/vg/a"),
        ("w!", "disk", "1", "2", "open /dev/vg/a"),
        ("r", "disk", "0", "4", "open /dev/vg/a ro"),
        ("r", "cdrom", "1", "7", "open /dev/vg/a ro"),
        ("w", "cdrom", "0", "5", "open /dev/vg/a ro"),
        ("w", "floppy", "0", "0", "open /dev/vg/a"),
    ] {
        let mut host = Host::new(DRIVER);
        host.put(BE, "mode", mode);
        host.put(BE, "device-type", device_type);
        host.put(BE, "removable", removable);
        host.run();
        assert_eq!(host.took(), format!("{open}, 2"));
        assert_eq!(host.be("info"), Some(info), "{mode} {device_type}");
        let (request, _) = host.vbd.as_ref().unwrap().open_image().unwrap();
        let read_only = mode == "r" || device_type == "cdrom";
        assert_eq!((request.read_only, request.forced), (read_only, mode == "w!"));
    }
}

#[test]
fn an_image_that_is_changed_is_used_from_the_next_ring_on() {
    let mut host = Host::connected(DRIVER);
    host.put(BE, "params", "/dev/vg/b");
    host.run();
    assert_eq!(host.took(), "");
    host.fe(1);
    assert_eq!(host.took(), "drain, close, open /dev/vg/b, 2");
}

#[test]
fn a_quota_that_is_exceeded() {
    let mut host = Host::new(DRIVER);
    host.publish_error = Some("EQUOTA".into());
    host.run();
    assert_eq!(host.took(), "open /dev/vg/a, publish fails");
    host.changed = true;
    host.run();
    assert_eq!(host.took(), "", "not before the timer");
    host.fire(Timer::Republish);
    host.publish_error = None;
    host.fire(Timer::Republish);
    assert_eq!(host.took(), "publish fails, 2");
}

#[test]
fn a_frontend_that_changes_its_mind_all_the_time_cannot_hold_up_an_unplug() {
    let mut host = ready();
    host.hold = vec!["Publish"];
    host.unplug();
    host.fe(6).fe(1);
    host.hold.clear();
    host.run();
    assert_eq!(host.took(), "close, 6");
}
