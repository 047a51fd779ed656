//! What a format is asked, and what it may ask for.

use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;

use crate::error::{Corruption, Failure};
use crate::ledger::{Ledger, Stamp, Tick};
use crate::pages::{Found, Key, PageRef, Pages};
use crate::{Extent, Geometry, Run};

/// Where a page lies in an image: a multiple of the format's page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageAt(pub u64);

/// Why there is no answer yet. `Need` and `Busy` promise that nothing has changed: wait, and ask the same again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// A page must be read first.
    Need(PageAt),
    /// Something that is under way must end first: [`Format::work`], a page that is being read, a cache full of dirty pages.
    Busy,
    /// There will be no answer.
    Failed(Failure),
}

impl From<Failure> for Wait {
    fn from(failure: Failure) -> Wait {
        Wait::Failed(failure)
    }
}

impl From<Corruption> for Wait {
    fn from(corruption: Corruption) -> Wait {
        Wait::Failed(Failure::Corrupt(corruption))
    }
}

/// An answer, or why there is none yet; `?` hands the reason on.
pub type Step<T> = Result<T, Wait>;

/// What a write of an extent found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prepared {
    /// The first `sectors` of the extent lie at `offset_bytes` and may be overwritten there: nothing is to be committed.
    InPlace {
        /// Where in the image.
        offset_bytes: u64,
        /// How many of the asked sectors.
        sectors: u64,
    },
    /// New space, to be committed or released.
    Allocated(Payout),
}

/// What the extent of a [`Payout`] held before, in this image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// Zeroes.
    Zero,
    /// What the parent says.
    Parent,
    /// Data of its own, which stays where it is until the commit.
    Data,
}

/// Space for whole units of a write. The owner fills what the guest does not write, writes the guest's data, and then commits;
/// until then reads give what was there before. No other change of mapping within `locked` is asked meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Payout {
    /// Whole units: begins at or before the asked extent, and ends behind its first sector. May be longer than what was asked.
    pub extent: Extent,
    /// What must not be asked to change meanwhile: the extent, or more where units share an entry.
    pub locked: Extent,
    /// Where the extent's first sector lies in the image.
    pub offset_bytes: u64,
    /// The space reads as zero: what is to be zero need not be written.
    pub reads_zero: bool,
    /// What was there.
    pub before: Before,
    /// The format's own.
    pub ticket: u64,
}

/// What became of a request that an extent read as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroed {
    /// The first `sectors` are done (or, for a discard, let be).
    Done {
        /// How many of the asked sectors.
        sectors: u64,
    },
    /// The first `sectors` lie at `offset_bytes`: zeroes are to be written there, or, for a discard, the space given back.
    InPlace {
        /// Where in the image.
        offset_bytes: u64,
        /// How many of the asked sectors.
        sectors: u64,
    },
    /// The first `sectors` are to be written like data: see [`Format::prepare`].
    Write {
        /// How many of the asked sectors.
        sectors: u64,
    },
}

/// Transfers that a format wants for itself, besides pages. The answer comes to [`Format::answered`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The format's name for it.
    pub tag: u64,
    /// Where in the image.
    pub offset_bytes: u64,
    /// What.
    pub kind: OrderKind,
}

/// See [`Order`]. Lengths and offsets are multiples of 512.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OrderKind {
    /// Read so many bytes.
    Read(u32),
    /// Write these.
    Write(Vec<u8>),
    /// Make so many bytes read as zero.
    Zero(u64),
    /// Give so many bytes back to the file system: what they read as afterwards is not known.
    Punch(u64),
    /// Make the image end at `offset_bytes`. New space reads as zero.
    SetLength,
}

/// What is known of the file or device below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Its length when it was opened.
    pub length_bytes: u64,
    /// It can be made longer (a file, not a device).
    pub grows: bool,
    /// What it grows by reads as zero, also after a crash.
    pub new_space_is_zero: bool,
}

/// What a format sees while it is asked: its pages, what is durable, and a place for its orders.
#[derive(Debug)]
pub struct Context<'a> {
    pub(crate) pages: &'a mut Pages,
    pub(crate) ledger: &'a mut Ledger,
    pub(crate) orders: &'a mut VecDeque<Order>,
    pub(crate) disk: u32,
    pub(crate) image: u32,
    pub(crate) page_bytes: u32,
    /// The oldest request that may still use what an earlier map said, and the number of the next.
    pub(crate) users: (u64, u64),
}

impl Context<'_> {
    fn key(&self, offset_bytes: u64) -> Key {
        Key { disk: self.disk, image: self.image, offset_bytes }
    }

    /// The page that holds a byte of the image, and where in the page it is. The reference is good until the next call.
    ///
    /// # Errors
    /// [`Wait::Need`] and [`Wait::Busy`].
    pub fn page(&mut self, offset_bytes: u64) -> Step<(PageRef, usize)> {
        let within = offset_bytes & u64::from(self.page_bytes - 1);
        let at = offset_bytes - within;
        match self.pages.find(self.key(at)) {
            Found::Ready(page) => Ok((page, crate::bytes::index(within))),
            Found::Reading(_) | Found::Absent => Err(Wait::Need(PageAt(at))),
        }
    }

    /// A page of zeroes for new metadata, without a read. It is clean: what is not changed afterwards must read as zero on the
    /// medium too.
    ///
    /// # Errors
    /// [`Wait::Busy`] while no page can be evicted.
    pub fn new_page(&mut self, offset_bytes: u64) -> Step<PageRef> {
        let key = self.key(offset_bytes & !u64::from(self.page_bytes - 1));
        let page = match self.pages.find(key) {
            Found::Ready(page) => page,
            Found::Reading(_) => return Err(Wait::Busy),
            Found::Absent => self.pages.claim(key).ok_or(Wait::Busy)?,
        };
        self.pages.fill(page, &[]);
        Ok(page)
    }

    /// What a page holds.
    #[must_use]
    pub fn bytes(&self, page: PageRef) -> &[u8] {
        self.pages.bytes(page)
    }

    /// Changes a page. It reaches the medium at some time after the sync `after`; [`Context::stamp`] tells when it has.
    pub fn put(&mut self, page: PageRef, at: usize, value: &[u8], after: Tick) {
        crate::bytes::put(self.pages.bytes_mut(page), at, value);
        self.ledger.changed(self.pages, page, after);
    }

    /// Drops the pages of a range whose bytes mean something else from now on.
    pub fn forget(&mut self, offset_bytes: u64, length_bytes: u64) {
        let end = offset_bytes.saturating_add(length_bytes);
        let mut at = offset_bytes & !u64::from(self.page_bytes - 1);
        while at < end {
            self.pages.forget(self.key(at));
            at += u64::from(self.page_bytes);
        }
    }

    /// The newest change of any page.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        self.ledger.stamp()
    }

    /// Whether that change and all before it are durable. Asking makes it so, some time: the answer comes with the next
    /// [`Format::work`].
    pub fn durable(&mut self, stamp: Stamp) -> bool {
        self.ledger.want(stamp)
    }

    /// Whether that change and all before it are durable already: for what has time.
    #[must_use]
    pub fn is_durable(&self, stamp: Stamp) -> bool {
        self.ledger.is_durable(stamp)
    }

    /// The sync behind which everything that has ended by now is durable.
    #[must_use]
    pub fn tick(&self) -> Tick {
        self.ledger.tick()
    }

    /// Whether that sync is over. Asking makes it so, some time.
    pub fn synced(&mut self, tick: Tick) -> bool {
        self.ledger.want_sync(tick)
    }

    /// A number for [`Context::unused`]: taken when something is unlinked.
    #[must_use]
    pub fn user(&self) -> u64 {
        self.users.1
    }

    /// Whether every request that began before `user` was taken has ended: what was unlinked then is used by nobody.
    #[must_use]
    pub fn unused(&self, user: u64) -> bool {
        self.users.0 >= user
    }

    /// Wants a transfer.
    pub fn order(&mut self, order: Order) {
        self.orders.push_back(order);
    }
}

/// One image of a chain. All methods are called by one owner, [`crate::Disk`]. What it is asked for lies on the disk that
/// [`Format::geometry`] says.
pub trait Format: fmt::Debug + Send {
    /// The disk.
    fn geometry(&self) -> Geometry;

    /// Size of this image's pages: a power of two of 512 to [`crate::PAGE_BYTES`], such that no page holds both metadata and data.
    fn page_bytes(&self) -> u32;

    /// Bytes of the unit in which places change as a rule: a power of two. The merged map has an entry for each.
    fn unit_bytes(&self) -> u64;

    /// Where the first part of an extent lies.
    ///
    /// # Errors
    /// See [`Wait`].
    fn map(&self, cx: &mut Context<'_>, extent: Extent) -> Step<Run>;

    /// Unpacks a [`crate::Place::Compressed`] unit.
    ///
    /// # Errors
    /// [`Failure::Corrupt`].
    fn unpack(&mut self, at_bytes: u64, packed: &[u8], unit: &mut Vec<u8>) -> Result<(), Failure> {
        let (_, _) = (packed, unit);
        Err(Failure::Corrupt(Corruption { what: "packed data in a format without compression", at_bytes }))
    }

    /// Where a write of the first part of an extent lands.
    ///
    /// # Errors
    /// See [`Wait`].
    fn prepare(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Prepared>;

    /// Where a write of the first part of an extent lands, in bytes of the image, and of how many sectors, if nothing has to be
    /// allocated for it; otherwise `None`: see [`Format::prepare`].
    ///
    /// # Errors
    /// See [`Wait`].
    fn in_place(&mut self, cx: &mut Context<'_>, extent: Extent) -> Step<Option<(u64, u64)>> {
        let (_, _) = (cx, extent);
        Ok(None)
    }

    /// The data of a payout are where it said: from now on they are what reads find. The change must not reach the medium
    /// before the sync `after`.
    ///
    /// # Errors
    /// See [`Wait`]. After [`Wait::Failed`] the payout is still to be released.
    fn commit(&mut self, cx: &mut Context<'_>, payout: &Payout, after: Tick) -> Step<()>;

    /// The write of a payout failed: its space is free again.
    fn release(&mut self, cx: &mut Context<'_>, payout: &Payout);

    /// Makes the first part of an extent read as zero. A `discard` may do nothing, but never shows the parent's data.
    ///
    /// # Errors
    /// See [`Wait`].
    fn zero(&mut self, cx: &mut Context<'_>, extent: Extent, discard: bool) -> Step<Zeroed>;

    /// Goes on with what is under way: reserving space, freeing it, growing tables. Called whenever something has ended;
    /// `Ok` says that nothing is under way.
    ///
    /// # Errors
    /// See [`Wait`]. [`Wait::Failed`] is what whoever waits for it is told; work goes on when it is called again.
    fn work(&mut self, cx: &mut Context<'_>) -> Step<()>;

    /// An order ended.
    fn answered(&mut self, cx: &mut Context<'_>, tag: u64, result: Result<&[u8], Failure>);

    /// Leaves the image as somebody else expects it: no leak, no dirty bit. Called until it says `Ok`, with every request
    /// ended; the owner then syncs once more.
    ///
    /// # Errors
    /// See [`Wait`].
    fn close(&mut self, cx: &mut Context<'_>) -> Step<()>;

    /// What was found to be wrong with the image, if something was.
    fn corruption(&self) -> Option<Corruption> {
        None
    }
}
