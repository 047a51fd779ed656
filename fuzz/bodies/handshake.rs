//! Any nodes in both directories, in any order of events: the state machine answers, and never panics.
use vbdd::vbd::{
    Action, Address, Config, ConnectError, Event, Geometry, Kind, Misdeed, Node, Place, Vbd, World,
    further_keys, keys,
};

/// Plays one input.
pub fn play(data: &[u8]) {
    let address = Address { kind: Kind::Vbd, frontend: 7, devid: 51712 };
    let mut rest = data;
    let mut byte = || {
        let (first, tail) = rest.split_first()?;
        rest = tail;
        Some(*first)
    };
    let place = if byte().unwrap_or(0) % 2 == 0 { Place::Dom0 } else { Place::DriverDomain };
    let mut vbd = Vbd::new(address, Config::new(1, place));
    let mut actions = Vec::new();
    vbd.step(Event::Changed, &mut actions);
    while let Some(choice) = byte() {
        let mut world = World::new();
        let geometry =
            Geometry { sectors: u64::from(choice) << 3, physical_sector_bytes: 512, discard: None };
        let event = match choice % 12 {
            0..=2 => {
                let mut node = || {
                    let node = match byte()? {
                        kind @ 0..=9 => Node::Present(vec![b'0' + kind]),
                        10..=19 => Node::Missing,
                        20..=24 => Node::Denied,
                        25..=40 => Node::Present(address.frontend_path().into_bytes()),
                        41..=60 => Node::Present(b"/srv/images/a".to_vec()),
                        61..=70 => Node::Present(b"phy".to_vec()),
                        71..=80 => Node::Present(b"w".to_vec()),
                        kind => Node::Present((0..kind % 40).filter_map(|_| byte()).collect()),
                    };
                    Some(node)
                };
                for key in keys() {
                    let Some(node) = node() else { break };
                    world.put(key, node);
                }
                for key in further_keys(&world) {
                    let Some(node) = node() else { break };
                    world.put(key, node);
                }
                Event::World(&world)
            }
            3 => Event::Published,
            4 => Event::Superseded,
            5 => Event::Opened(Ok(geometry)),
            6 => Event::Opened(Err("no".to_owned())),
            7 => Event::Connected(usize::from(choice / 12 % 2)),
            8 => Event::ConnectFailed(ConnectError::Misbehaved(Misdeed::BadGrant(1))),
            9 => Event::Disconnected,
            10 => Event::ImageClosed,
            _ => Event::Changed,
        };
        vbd.step(event, &mut actions);
        for action in actions.drain(..) {
            if let Action::Publish(publication) = action {
                assert!(publication.writes.iter().all(|(_, value)| value.len() <= 4096));
            }
        }
    }
}
