//! What frontends are offered, and what one disk's toolstack or administrator says about that.

use rings::Abi;

use super::world::{Side, World};
use crate::limits::{INDIRECT_SEGMENTS, QUEUES_MAX, RING_PAGE_ORDER_MAX};

/// The node of the backend directory that holds a disk's own options.
pub(super) const OPTIONS_NODE: &str = "vbdd";

/// Optional parts of the protocol. What is 0 or false is not offered: its nodes are not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Features {
    /// `max-ring-page-order`, and 1 << that as `max-ring-pages`. 0: rings of one page.
    pub ring_page_order_max: u8,
    /// `multi-queue-max-queues`. 1: one queue, at the top level.
    pub queues_max: u8,
    /// `feature-max-indirect-segments`. 0: no indirect requests.
    pub indirect_segments_max: u16,
    /// `feature-persistent`
    pub persistent: bool,
    /// `feature-flush-cache`
    pub flush: bool,
    /// `feature-barrier`
    pub barrier: bool,
    /// `feature-discard`, for writable images whose [`Geometry`](super::Geometry) has a [`Discard`].
    pub discard: bool,
}

impl Features {
    /// What is common to both.
    #[must_use]
    pub fn limited_to(self, other: Features) -> Features {
        Features {
            ring_page_order_max: self.ring_page_order_max.min(other.ring_page_order_max),
            queues_max: self.queues_max.min(other.queues_max),
            indirect_segments_max: self.indirect_segments_max.min(other.indirect_segments_max),
            persistent: self.persistent && other.persistent,
            flush: self.flush && other.flush,
            barrier: self.barrier && other.barrier,
            discard: self.discard && other.discard,
        }
    }
}

impl Default for Features {
    /// All but barriers, which a frontend would use beside flushes for nothing, and persistent grants; four queues.
    fn default() -> Features {
        Features {
            ring_page_order_max: RING_PAGE_ORDER_MAX,
            queues_max: 4,
            indirect_segments_max: INDIRECT_SEGMENTS,
            persistent: false,
            flush: true,
            barrier: false,
            discard: true,
        }
    }
}

/// How an image can be punched: `discard-granularity` and `discard-alignment`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Discard {
    /// The smallest piece that gives space back, in bytes; a multiple of 512.
    pub granularity_bytes: u32,
    /// Where the first such piece begins, in bytes.
    pub alignment_bytes: u32,
}

/// What one disk is served with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Terms {
    /// What its frontend is offered.
    pub offered: Features,
    /// Its answers come in the order of its requests (OpenBSD takes them by position).
    pub in_order: bool,
    /// Writes of nothing but zeroes take no space, where the image has a format.
    pub detect_zeroes: bool,
    /// The ABI of a frontend that does not say.
    pub default_abi: Abi,
}

impl Terms {
    /// The terms of a disk: `usual`, as the options in its backend directory change them.
    ///
    /// # Errors
    /// What is wrong with the options, in one line for `error`.
    pub(super) fn of(usual: Terms, world: &World) -> Result<Terms, String> {
        let node = world.node(Side::Backend, OPTIONS_NODE);
        let mut terms = usual;
        if node.is_present() {
            let text = node.text().ok_or("the node vbdd is no text")?;
            terms = usual.with(text).map_err(|error| format!("the node vbdd says {error}"))?;
        }
        // libxl's and xenopsd's word for it.
        if world.node(Side::Backend, "discard-enable").text() == Some("0") {
            terms.offered.discard = false;
        }
        Ok(terms)
    }

    /// These terms as `options` change them: words separated by spaces or commas, see `docs/xenstore.md`.
    ///
    /// # Errors
    /// Names the word that is no option, and those that there are.
    pub fn with(mut self, options: &str) -> Result<Terms, String> {
        for word in options.split([' ', ',']).filter(|word| !word.is_empty()) {
            self.option(word).map_err(|()| {
                let shown: String = word.escape_default().take(40).collect();
                format!(
                    "\"{shown}\", which is no option: in-order, barrier, detect-zeroes, persistent=0|1, discard=0|1, \
                     max-queues=N, max-ring-page-order=N, protocol=ABI"
                )
            })?;
        }
        Ok(self)
    }

    fn option(&mut self, word: &str) -> Result<(), ()> {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        let flag = || match value {
            "0" => Ok(false),
            "1" | "" => Ok(true),
            _ => Err(()),
        };
        // More than is served cannot be asked for; less can.
        let number = |least: u8, most: u8| {
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            let asked: u8 = if digits { value.parse().map_err(|_| ()) } else { Err(()) }?;
            (least..=most).contains(&asked).then_some(asked).ok_or(())
        };
        let offered = &mut self.offered;
        match name {
            "in-order" => self.in_order = flag()?,
            "detect-zeroes" => self.detect_zeroes = flag()?,
            "persistent" => offered.persistent &= flag()?,
            "discard" => offered.discard &= flag()?,
            // Barriers are served in any case; few frontends want to hear of them beside flushes.
            "barrier" => offered.barrier = flag()?,
            "max-queues" => offered.queues_max = offered.queues_max.min(number(1, QUEUES_MAX)?),
            "max-ring-page-order" => {
                offered.ring_page_order_max =
                    offered.ring_page_order_max.min(number(0, RING_PAGE_ORDER_MAX)?);
            }
            "protocol" => self.default_abi = Abi::from_protocol(value).ok_or(())?,
            _ => return Err(()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::vbd::{Key, Node};

    const USUAL: Terms = Terms {
        offered: Features {
            ring_page_order_max: 4,
            queues_max: 4,
            indirect_segments_max: 256,
            persistent: true,
            flush: true,
            barrier: true,
            discard: true,
        },
        in_order: false,
        detect_zeroes: false,
        default_abi: Abi::X86_64,
    };

    fn terms(nodes: &[(&'static str, &str)]) -> Result<Terms, String> {
        let mut world = World::new();
        for (name, value) in nodes {
            let key = Key { side: Side::Backend, name: Cow::Borrowed(name) };
            world.put(key, Node::Present(value.as_bytes().to_vec()));
        }
        Terms::of(USUAL, &world)
    }

    #[test]
    fn options_take_away_or_announce_what_is_served() {
        assert_eq!(terms(&[]), Ok(USUAL));
        assert_eq!(terms(&[("vbdd", " ,")]), Ok(USUAL));
        let with = |text: &'static str| terms(&[("vbdd", text)]).unwrap();
        assert!(with("in-order").in_order && !with("in-order=0").in_order);
        assert!(with("detect-zeroes").detect_zeroes && !with("detect-zeroes=0").detect_zeroes);
        assert!(with("barrier").offered.barrier && !with("barrier=0").offered.barrier);
        assert_eq!(with("max-queues=2 max-ring-page-order=0").offered.queues_max, 2);
        assert_eq!(with("max-queues=8").offered.queues_max, 4, "4 is all that is served");
        assert_eq!(with("max-ring-page-order=0").offered.ring_page_order_max, 0);
        assert_eq!(with("protocol=x86_32-abi,persistent=0").default_abi, Abi::X86_32);
        assert!(!with("persistent=0").offered.persistent && with("persistent").offered.persistent);
        assert!(!with("discard=0").offered.discard);
        assert!(!terms(&[("discard-enable", "0")]).unwrap().offered.discard);
        assert!(terms(&[("discard-enable", "1")]).unwrap().offered.discard);
    }

    #[test]
    fn what_is_no_option_is_named() {
        for bad in [
            "inorder",
            "in-order=2",
            "max-queues",
            "max-queues=",
            "max-queues=0",
            "max-queues=9",
            "max-queues=+2",
            "max-ring-page-order=5",
            "protocol=ppc",
            "=",
            "a\u{7}b",
        ] {
            let refusal = terms(&[("vbdd", bad)]).map(|_| ()).unwrap_err();
            assert!(refusal.contains("no option") && refusal.len() <= 250, "{bad}: {refusal}");
        }
    }
}
