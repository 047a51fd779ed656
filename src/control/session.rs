//! One client of the control door.

use std::future::poll_fn;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::task::Poll;

use super::{Request, Wakeups};
use crate::limits::CONTROL_LINE_BYTES_MAX;

/// Reads lines and answers each, until the client closes, misbehaves or is dropped for age.
pub(super) async fn run(stream: Rc<UnixStream>, key: usize, wakeups: Wakeups) {
    let mut received = Vec::new();
    while let Some(line) = read_line(&stream, key, &wakeups, &mut received).await {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let answer = ask(words, key, &wakeups).await;
        if !write_all(&stream, key, &wakeups, answer.as_bytes()).await {
            return;
        }
    }
}

/// Waits until the poller wakes this session.
async fn ready(key: usize, wakeups: &Wakeups) {
    let mut waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        wakeups.0.borrow_mut().wakers.insert(key, context.waker().clone());
        Poll::Pending
    })
    .await;
}

/// Writes all of it, at the client's pace: the status of many disks is longer than a socket's buffer. False if it cannot be
/// written.
async fn write_all(stream: &UnixStream, key: usize, wakeups: &Wakeups, mut bytes: &[u8]) -> bool {
    while !bytes.is_empty() {
        match (&*stream).write(bytes) {
            Ok(0) => return false,
            Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                wakeups.0.borrow_mut().writing.insert(key);
                ready(key, wakeups).await;
                wakeups.0.borrow_mut().writing.remove(&key);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

async fn read_line(
    stream: &UnixStream,
    key: usize,
    wakeups: &Wakeups,
    received: &mut Vec<u8>,
) -> Option<String> {
    loop {
        if let Some(end) = received.iter().position(|byte| *byte == b'\n') {
            let rest = received.split_off(end + 1);
            let line = std::mem::replace(received, rest);
            return String::from_utf8(line).ok();
        }
        if received.len() > CONTROL_LINE_BYTES_MAX {
            return None;
        }
        let mut bytes = [0_u8; 256];
        match (&*stream).read(&mut bytes) {
            Ok(0) => return None,
            Ok(length) => received.extend_from_slice(bytes.get(..length)?),
            Err(error) if error.kind() == ErrorKind::WouldBlock => ready(key, wakeups).await,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Leaves the question for the backend and waits for the answer.
async fn ask(words: Vec<String>, key: usize, wakeups: &Wakeups) -> String {
    wakeups.0.borrow_mut().requests.push_back(Request { words, session: key });
    poll_fn(|context| {
        let mut shared = wakeups.0.borrow_mut();
        if let Some(answer) = shared.answers.remove(&key) {
            return Poll::Ready(answer);
        }
        shared.wakers.insert(key, context.waker().clone());
        Poll::Pending
    })
    .await
}
