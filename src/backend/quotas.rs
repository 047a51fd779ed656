//! A driver domain's share of xenstore: how many disks fit, and what happens when no more do.

use xenstore::{ErrorCode, Path, WatchToken};

use super::Backend;
use crate::hypervisor::Hypervisor;
use crate::limits::{NODES_PER_DISK, REWATCH_INTERVAL};
use crate::storage::Storage;
use crate::xenbus::Session;

/// What to do about a quota, for the log.
pub(super) const RAISE: &str = "this domain's xenstore quota may be used up: raise it (xenstore-control quota DOMAIN nodes N, watches N; \
                                see docs/operating.md), or serve fewer disks here";

/// How many disks fit into a domain that may own `nodes` and have `watches`, with `kinds` of them claimed.
#[must_use]
pub fn disks_that_fit(nodes: u32, watches: u32, kinds: u32) -> u32 {
    (nodes / NODES_PER_DISK).min(watches.saturating_sub(kinds))
}

/// Whether a refusal may be a quota's.
pub(super) fn is_quota(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::NoSpace | ErrorCode::TooBig)
}

impl<H: Hypervisor, S: Storage> Backend<H, S> {
    /// Without its watch a disk's frontend goes unseen: it is asked for again, as another disk may have gone.
    pub(super) fn watch_refused(&mut self, token: WatchToken, path: Path, code: ErrorCode) {
        let hint = if is_quota(code) { RAISE } else { "see the permissions of that path" };
        let text = format!("xenstored refused the watch of {path}: {code}; changes there go unseen; {hint}");
        match self.by_token.get(&token.0).copied() {
            Some(address) => self.notice(address, log::Level::Error, &text),
            None => log::error!("{text}"),
        }
        self.unwatched.retain(|(_, known, _)| *known != token);
        self.unwatched.push((self.now + REWATCH_INTERVAL, token, path));
    }

    /// Asks again for the watches that are due, of disks that are still there.
    pub(super) fn watch_again(&mut self, session: &mut Session) {
        let now = self.now;
        if !self.unwatched.iter().any(|(at, ..)| *at <= now) {
            return;
        }
        let (due, later) = std::mem::take(&mut self.unwatched).into_iter().partition(|(at, ..)| *at <= now);
        self.unwatched = later;
        for (_, token, path) in due {
            let known = self.by_token.contains_key(&token.0) || super::scan::kind_of(token).is_some();
            if known && session.watch(&path, token).is_err() {
                self.unwatched.push((now + REWATCH_INTERVAL, token, path));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{XENSTORE_NODES, XENSTORE_WATCHES};

    #[test]
    fn the_usual_quotas_are_enough_for_27_disks() {
        assert_eq!(disks_that_fit(XENSTORE_NODES, XENSTORE_WATCHES, 1), 27);
        assert_eq!(disks_that_fit(100_000, XENSTORE_WATCHES, 3), 125);
        assert_eq!(disks_that_fit(0, 0, 3), 0);
    }
}
