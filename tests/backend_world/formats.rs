//! Images with formats, from the toolstack's nodes to the closed image.

use std::time::Duration;

use ::formats::qcow2::check::{Fix, check};
use ::formats::qcow2::{Header, Repair};
use vbdd::params::Format;

use super::host::Host;
use super::world::chains::{self, Bytes};
use super::world::guest::Habits;
use super::world::model::DiskModel;
use super::{both_places, neighbour_is_well, pauses, unplug_cleanly, with_neighbour};

/// An image of a format over a raw parent: the model's number, and what `params` says.
fn add_chain(host: &Host, sectors: usize, format: Format) -> (usize, String) {
    let path = format!("/images/{}", host.shared.models.borrow().len());
    let image = chains::create(&host.shared, &path, sectors, format);
    let mut models = host.shared.models.borrow_mut();
    models.push(DiskModel::new(image, sectors, false));
    (models.len() - 1, format!("{}:{path}", format.name()))
}

fn habits(guest: u16, disk: usize, requests: u32) -> Habits {
    Habits { requests, depth: 8, discards: 0, ..Habits::new(guest, disk) }
}

/// The image holds what its guests have written, and was left as others expect it.
fn is_closed_well(host: &Host, disk: usize) {
    let model = host.shared.models.borrow()[disk].clone();
    let content = chains::contents(&host.shared, model.image).unwrap();
    for sector in 0..model.size() {
        model.check_now(sector, &content[sector as usize]).unwrap();
    }
    if host.shared.media.borrow().image(model.image).format == Format::Qcow2 {
        let mut medium = Bytes::new(host.shared.clone(), model.image);
        assert_eq!(Repair::of(&Header::read(&mut medium).unwrap()), Repair::NotNeeded);
        assert_eq!(check(&mut medium, Fix::Nothing).unwrap().leaks, 0);
    }
}

#[test]
fn a_disk_is_served_unplugged_and_its_image_closed() {
    for format in [Format::Qcow2, Format::Vhd] {
        both_places(|seed, own| {
            let mut host = with_neighbour(seed, own);
            let (disk, params) = add_chain(&host, 300, format);
            host.attach(7, &params, &[]);
            host.connect_guest(habits(7, disk, 300));
            host.wait_served(7);
            unplug_cleanly(&mut host, 7);
            neighbour_is_well(&mut host);
            is_closed_well(&host, disk);
        });
    }
}

#[test]
fn stops_and_deaths_under_io_are_only_pauses() {
    for seed in 0..3 {
        for format in [Format::Qcow2, Format::Vhd] {
            let mut host = Host::new(seed, 3);
            let disks: Vec<usize> = (1..=3)
                .map(|guest| {
                    let (disk, params) = add_chain(&host, 300, format);
                    host.attach(guest, &params, &[]);
                    host.connect_guest(habits(guest, disk, 1500));
                    disk
                })
                .collect();
            pauses(&mut host, 20, 5);
            for guest in 1..=3 {
                host.wait_served(guest);
                assert_eq!(host.be_node(guest, "state").as_deref(), Some("4"));
                unplug_cleanly(&mut host, guest);
            }
            host.run_for(Duration::from_secs(5));
            host.check_nothing_held();
            assert!(host.shared.vault.borrow().names().is_empty());
            disks.iter().for_each(|disk| is_closed_well(&host, *disk));
        }
    }
}

/// Two domains of one machine have one opening: what one writes the other reads, and the last to leave closes the image.
#[test]
fn domains_of_one_machine_use_one_disk() {
    let mut host = with_neighbour(3, 0);
    let (disk, params) = add_chain(&host, 300, Format::Qcow2);
    host.attach(7, &params, &[]);
    host.connect_guest(habits(7, disk, 200));
    host.store.introduce_domain(8);
    host.store.write_all(0, &[("/local/domain/7/vm", "/vm/a"), ("/local/domain/8/vm", "/vm/a")]).unwrap();
    host.wait_served(7);
    host.attach(8, &params, &[]);
    host.connect_guest(habits(8, disk, 200));
    host.wait_served(8);
    // Another machine, and one that may only read beside a writer.
    host.attach(9, &params, &[("mode", Some("r"))]);
    host.wait_be(9, "6");
    assert!(host.be_node(9, "error").is_some_and(|text| text.contains("an overlay of its own")));
    unplug_cleanly(&mut host, 7);
    assert_eq!(host.be_node(8, "state").as_deref(), Some("4"));
    unplug_cleanly(&mut host, 8);
    neighbour_is_well(&mut host);
    is_closed_well(&host, disk);
}

#[test]
fn what_lies_below_a_disk_is_not_given_to_a_writer() {
    let mut host = with_neighbour(3, 3);
    let (_, params) = add_chain(&host, 300, Format::Qcow2);
    let base = format!("{}.base", params.trim_start_matches("qcow2:"));
    host.shared.media.borrow_mut().make_writable(&base);
    host.attach(7, &params, &[]);
    host.wait_be(7, "2");
    host.attach(8, &base, &[]);
    host.wait_be(8, "6");
    assert!(host.be_node(8, "error").is_some_and(|text| text.contains("in use by guest 7")));
    host.attach(9, &base, &[("mode", Some("r"))]);
    host.wait_be(9, "2");
    // And the other way round; a `!` vouches for nothing.
    let mut host = with_neighbour(3, 3);
    let (_, params) = add_chain(&host, 300, Format::Qcow2);
    let base = format!("{}.base", params.trim_start_matches("qcow2:"));
    host.shared.media.borrow_mut().make_writable(&base);
    host.attach(8, &base, &[]);
    host.wait_be(8, "2");
    for (guest, mode) in [(7, "w"), (9, "w!"), (10, "r")] {
        host.attach(guest, &params, &[("mode", Some(mode))]);
        host.wait_be(guest, "6");
        assert!(
            host.be_node(guest, "error").is_some_and(|text| text.contains("in use by guest 8")),
            "{mode}"
        );
    }
    neighbour_is_well(&mut host);
}
