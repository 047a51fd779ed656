//! A xenstore client that knows which domain it speaks for.
//!
//! Everything above works with absolute paths, which mean the same on the socket and on the device; so before anything
//! else the own domain's number is read. Still without I/O: [`super::Xenbus`] moves the bytes of real connections, the
//! simulated world those of simulated ones.

use xenstore::{
    Client, Config, ErrorCode, Event, Failure, Job, JobId, Outcome, Path, ProtocolError, Statistics,
    SubmitError, WatchToken,
};

use crate::hypervisor::DomainId;

/// A client, and what it found out about itself.
#[derive(Debug)]
pub struct Session {
    client: Client,
    domain: Option<DomainId>,
    asking: Option<JobId>,
    reset_due: bool,
}

impl Session {
    /// A session that is not connected yet.
    #[must_use]
    pub fn new(config: Config) -> Session {
        Session { client: Client::new(config), domain: None, asking: None, reset_due: false }
    }

    /// The own domain. Known from the first [`Event::Reset`] on.
    #[must_use]
    pub fn domain(&self) -> Option<DomainId> {
        self.domain
    }

    /// A connection stands.
    pub fn connected(&mut self) {
        self.client.connected();
        self.ask_domain();
    }

    /// The connection is gone; see [`Client::disconnected`].
    pub fn disconnected(&mut self) {
        self.reset_due = false;
        self.client.disconnected();
    }

    /// Takes bytes that arrived.
    ///
    /// # Errors
    /// As [`Client::receive`]: close the connection and call [`Session::disconnected`].
    pub fn receive(&mut self, bytes: &[u8]) -> Result<(), ProtocolError> {
        self.client.receive(bytes)
    }

    /// The rest of exactly one message, to be written next.
    #[must_use]
    pub fn transmit(&self) -> Option<&[u8]> {
        self.client.transmit()
    }

    /// Says how much of it was written.
    pub fn transmitted(&mut self, bytes: usize) {
        self.client.transmitted(bytes);
    }

    /// Says that it was refused as a whole.
    ///
    /// # Errors
    /// As [`Client::refused`].
    pub fn refused(&mut self, code: ErrorCode) -> Result<(), ProtocolError> {
        self.client.refused(code)
    }

    /// When [`Session::handle_time`] is due at the latest.
    #[must_use]
    pub fn timeout(&self) -> Option<u64> {
        self.client.timeout()
    }

    /// Tells the time in milliseconds.
    pub fn handle_time(&mut self, now_ms: u64) {
        self.client.handle_time(now_ms);
    }

    /// Submits a job; see [`Client::submit`].
    ///
    /// # Errors
    /// As [`Client::submit`].
    pub fn submit(&mut self, job: Job) -> Result<JobId, SubmitError> {
        self.client.submit(job)
    }

    /// Watches a path; see [`Client::watch`].
    ///
    /// # Errors
    /// As [`Client::watch`].
    pub fn watch(&mut self, path: &Path, token: WatchToken) -> Result<(), SubmitError> {
        self.client.watch(path, token)
    }

    /// Ends a watch; see [`Client::unwatch`].
    pub fn unwatch(&mut self, path: &Path, token: WatchToken) {
        self.client.unwatch(path, token);
    }

    /// Counters of the client.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.client.statistics()
    }

    /// Whether [`Session::event`] may have something to give: a write that fails can end jobs without anything arriving.
    #[must_use]
    pub fn has_events(&self) -> bool {
        self.domain.is_some() && self.client.has_events()
    }

    /// Takes one event. [`Event::Reset`] comes only once the own domain is known, and no watch event before it.
    pub fn event(&mut self) -> Option<Event> {
        loop {
            self.ask_domain();
            let event = match self.domain {
                Some(_) => self.client.event()?,
                None => self.client.completion()?,
            };
            match event {
                Event::Reset if self.domain.is_none() => self.reset_due = true,
                Event::Job { id, outcome } if self.asking == Some(id) => {
                    self.asking = None;
                    self.domain_answered(&outcome);
                    if self.domain.is_some() && std::mem::take(&mut self.reset_due) {
                        return Some(Event::Reset);
                    }
                }
                event => return Some(event),
            }
        }
    }

    /// Asks for the own domain unless it is known or asked for. A full client is asked again later.
    fn ask_domain(&mut self) {
        if self.domain.is_none() && self.asking.is_none() && self.client.is_connected() {
            let job = Path::parse("domid").map(|path| Job::Read(vec![path]));
            self.asking = job.ok().and_then(|job| self.client.submit(job).ok());
        }
    }

    fn domain_answered(&mut self, outcome: &Outcome) {
        let answer = match outcome {
            Outcome::Read(values) => values.first(),
            Outcome::Failed(Failure::ConnectionLost { .. }) => return,
            _ => None,
        };
        self.domain = Some(match answer {
            Some(Ok(text)) => parse_domain(text).unwrap_or_else(|| {
                log::error!("xenstore: the own node `domid` holds no domain number; taking domain 0");
                0
            }),
            // Dom0 has no such node everywhere, and old sockets know no relative paths.
            Some(Err(ErrorCode::Missing | ErrorCode::Invalid)) | None => 0,
            Some(Err(code)) => {
                log::error!("xenstore: cannot read the own node `domid`: {code}; taking domain 0");
                0
            }
        });
    }
}

fn parse_domain(text: &[u8]) -> Option<DomainId> {
    let digits = std::str::from_utf8(text).ok()?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use xenstore::wire::{self, Header, MessageType};

    /// Answers the one request that is to be sent.
    fn answer(session: &mut Session, kind: MessageType, payload: &[u8]) {
        let sent = session.transmit().unwrap().to_vec();
        session.transmitted(sent.len());
        let header = Header::from_bytes(sent[..16].try_into().unwrap());
        let reply = wire::encode(kind, header.request, 0, &[payload]).unwrap();
        session.receive(&reply).unwrap();
    }

    fn connected() -> Session {
        let mut session = Session::new(Config::default());
        session.connected();
        assert_eq!((session.domain(), session.event()), (None, None));
        session
    }

    #[test]
    fn the_first_reset_waits_for_the_own_domain() {
        for (kind, payload, domain) in [
            (MessageType::Read, &b"7"[..], 7),
            (MessageType::Read, b"0", 0),
            (MessageType::Error, b"ENOENT\0", 0),
            (MessageType::Error, b"EINVAL\0", 0),
            (MessageType::Error, b"EACCES\0", 0),
            (MessageType::Read, b"", 0),
            (MessageType::Read, b"seven", 0),
            (MessageType::Read, b"-7", 0),
            (MessageType::Read, b"65536", 0),
        ] {
            let mut session = connected();
            answer(&mut session, kind, payload);
            assert_eq!(session.event(), Some(Event::Reset));
            assert_eq!((session.domain(), session.event()), (Some(domain), None), "{payload:?}");
        }
    }

    #[test]
    fn watch_events_wait_for_the_first_reset() {
        let mut session = Session::new(Config::default());
        let (path, token) = (Path::parse("/w").unwrap(), WatchToken(1));
        session.watch(&path, token).unwrap();
        session.connected();
        answer(&mut session, MessageType::Watch, b"OK\0");
        let fired = wire::encode(MessageType::WatchEvent, 0, 0, &[b"/w\x001\0"]).unwrap();
        session.receive(&fired).unwrap();
        assert_eq!(session.event(), None);
        answer(&mut session, MessageType::Read, b"7");
        assert_eq!(session.event(), Some(Event::Reset));
        assert_eq!(session.event(), Some(Event::Watch { token, path }));
    }

    #[test]
    fn a_connection_that_ends_before_the_answer_is_asked_again_on_the_next() {
        for look_in_between in [false, true] {
            let mut session = connected();
            session.disconnected();
            if look_in_between {
                assert_eq!(session.event(), None);
            }
            session.connected();
            assert_eq!(session.event(), None);
            answer(&mut session, MessageType::Read, b"7");
            assert_eq!(session.event(), Some(Event::Reset));
            assert_eq!((session.domain(), session.event()), (Some(7), None));
            session.disconnected();
            session.connected();
            assert_eq!(session.event(), Some(Event::Reset), "the domain is known now");
            assert_eq!(session.transmit(), None);
        }
    }
}
