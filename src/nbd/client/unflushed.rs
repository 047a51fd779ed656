//! Writes that a server has answered and that no flush has covered yet.
//!
//! A server that dies may lose them, and the next one at the same address would know nothing of it: it would answer a flush
//! that covers them with success. So they are kept, in the order of their answers, until a flush has ended well, and given to
//! the new server before anything else.

use std::collections::VecDeque;

/// What is kept for each besides its data, in bytes.
const ITEM_BYTES: u64 = 64;

#[derive(Clone, Copy, Debug)]
struct Item {
    offset_bytes: u64,
    length_bytes: u32,
    /// Where its data begin, counted from the first byte that was ever kept; `None` for zeroes.
    start: Option<u64>,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept<'a> {
    /// Where on the export.
    pub offset_bytes: u64,
    /// How much.
    pub length_bytes: u32,
    /// What was written, in two parts; `None` for zeroes.
    pub data: Option<(&'a [u8], &'a [u8])>,
}

/// All of them.
#[derive(Debug)]
pub struct Unflushed {
    items: VecDeque<Item>,
    /// The number of the first item.
    first: u64,
    bytes: VecDeque<u8>,
    /// How many bytes were dropped.
    dropped: u64,
    most_bytes: u64,
}

impl Unflushed {
    /// None yet. `most_bytes` is how much they may take.
    #[must_use]
    pub fn new(most_bytes: u64) -> Unflushed {
        Unflushed { items: VecDeque::new(), first: 0, bytes: VecDeque::new(), dropped: 0, most_bytes }
    }

    /// How much they may take from now on.
    pub fn bound(&mut self, most_bytes: u64) {
        self.most_bytes = most_bytes;
    }

    /// How much they take.
    #[must_use]
    pub fn cost_bytes(&self) -> u64 {
        self.bytes.len() as u64 + self.items.len() as u64 * ITEM_BYTES
    }

    /// Whether there is room for more, beside what is promised already. The first one always fits.
    #[must_use]
    pub fn has_room(&self, promised_bytes: u64) -> bool {
        let cost = self.cost_bytes();
        cost + promised_bytes <= self.most_bytes
    }

    /// What one of some length takes.
    #[must_use]
    pub fn cost_of(length_bytes: u64) -> u64 {
        length_bytes + ITEM_BYTES
    }

    /// Half of the room is taken.
    #[must_use]
    pub fn is_half_full(&self) -> bool {
        self.cost_bytes() * 2 > self.most_bytes
    }

    /// True if there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Keeps a write.
    pub fn keep(&mut self, offset_bytes: u64, data: &[u8]) {
        let start = Some(self.dropped + self.bytes.len() as u64);
        self.bytes.extend(data);
        let length_bytes = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.items.push_back(Item { offset_bytes, length_bytes, start });
    }

    /// Keeps zeroes.
    pub fn keep_zeroes(&mut self, offset_bytes: u64, length_bytes: u32) {
        self.items.push_back(Item { offset_bytes, length_bytes, start: None });
    }

    /// Numbers of the first one, and of the one that comes next.
    #[must_use]
    pub fn numbers(&self) -> (u64, u64) {
        (self.first, self.first + self.items.len() as u64)
    }

    /// One of them, by number.
    #[must_use]
    pub fn get(&self, number: u64) -> Option<Kept<'_>> {
        let place = usize::try_from(number.checked_sub(self.first)?).ok()?;
        let Item { offset_bytes, length_bytes, start } = *self.items.get(place)?;
        let data = start.map(|start| {
            let from = usize::try_from(start - self.dropped).unwrap_or(usize::MAX);
            let to = from.saturating_add(length_bytes as usize);
            let (front, back) = self.bytes.as_slices();
            let within = |slice: &[u8], from: usize, to: usize| (from.min(slice.len()), to.min(slice.len()));
            let (a, b) = within(front, from, to);
            let (c, d) = within(back, from.saturating_sub(front.len()), to.saturating_sub(front.len()));
            (front.get(a..b).unwrap_or_default(), back.get(c..d).unwrap_or_default())
        });
        Some(Kept { offset_bytes, length_bytes, data })
    }

    /// A flush covers all before a number: they are safe.
    pub fn drop_before(&mut self, number: u64) {
        while self.first < number {
            let Some(item) = self.items.pop_front() else { return };
            self.first += 1;
            if item.start.is_some() {
                let length = self.bytes.len().min(item.length_bytes as usize);
                self.bytes.drain(..length);
                self.dropped += length as u64;
            }
        }
    }

    /// Gives memory back that is not needed now.
    pub fn trim(&mut self) {
        if self.items.is_empty() {
            self.items.shrink_to_fit();
            self.bytes.shrink_to_fit();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_had_back_until_it_is_dropped() {
        let mut seed = 1_u64;
        let mut unflushed = Unflushed::new(10_000);
        let mut model: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
        for round in 0..5000_u64 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (what, length) = (seed >> 60, (seed >> 33) as usize % 300);
            if what < 9 {
                let data = vec![u8::try_from(round % 251).unwrap(); length];
                unflushed.keep(round, &data);
                model.push_back((round, data));
            } else if what < 11 {
                unflushed.keep_zeroes(round, 77);
                model.push_back((round, Vec::new()));
            } else {
                let (first, end) = unflushed.numbers();
                let number = first + seed % (end - first + 1);
                unflushed.drop_before(number);
                model.drain(..usize::try_from(number - first).unwrap());
            }
            let (first, end) = unflushed.numbers();
            assert_eq!(end - first, model.len() as u64);
            for (number, (offset, data)) in (first..end).zip(&model) {
                let kept = unflushed.get(number).unwrap();
                assert_eq!(kept.offset_bytes, *offset);
                match kept.data {
                    Some((front, back)) => assert_eq!([front, back].concat(), *data),
                    None => assert!(data.is_empty() && kept.length_bytes == 77),
                }
            }
            assert_eq!(unflushed.get(end), None);
            let bytes: usize = model.iter().map(|(_, data)| data.len()).sum();
            assert_eq!(unflushed.cost_bytes(), bytes as u64 + 64 * model.len() as u64);
        }
    }
}
