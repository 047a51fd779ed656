//! Any bytes from xenstored, in any pieces, while the client works: it takes them or says which rule was broken.
use xenstore::{Client, Config, Edit, Guard, Job, Path, WatchToken};

/// Plays one input.
pub fn play(data: &[u8]) {
    let mut client = Client::new(Config::default());
    client.connected();
    let path = |text: &str| Path::parse(text).expect("a constant");
    let _ = client.watch(&path("/local/domain/1/backend/vbd"), WatchToken(1));
    let _ = client.submit(Job::Read(vec![path("/a"), path("/b")]));
    let _ = client.submit(Job::List(path("/c")));
    let _ = client.submit(Job::Transaction {
        guards: vec![(path("/d"), Guard::Exists)],
        edits: vec![Edit::Write(path("/e"), b"4".to_vec()), Edit::Remove(path("/f"))],
    });
    let mut rest = data;
    let mut now = 0;
    while let Some((length, tail)) = rest.split_first() {
        let (piece, behind) = tail.split_at(tail.len().min(usize::from(*length)));
        rest = behind;
        while let Some(length) = client.transmit().map(<[u8]>::len) {
            client.transmitted(length);
        }
        if client.receive(piece).is_err() {
            client.disconnected();
            client.connected();
        }
        now += 1;
        client.handle_time(now);
        while client.event().is_some() {}
    }
}
