//! The pool against a naive model of itself.

use super::*;

/// A small generator (xorshift): the seed replays a run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

#[test]
fn sets_of_pages() {
    for first in 0..CHUNK_PAGES {
        for count in [1, 2, 63, 64, 65, 128, 200, 256] {
            let set = Pages::range(first, count);
            for page in 0..CHUNK_PAGES {
                let expected = page >= first && page < first + count;
                let word = set.0[(page / 64) as usize];
                assert_eq!((word >> (page % 64)) & 1 == 1, expected, "range {first}+{count} page {page}");
            }
            if first + count <= CHUNK_PAGES {
                assert_eq!(set.first_run(count), Some(first));
                assert_eq!(set.first_run(count + 1), None);
                assert_eq!(set.run_length(first), count);
                assert_eq!(set.shifted_down(first), Pages::range(0, count));
            }
        }
    }
}

#[test]
fn never_handed_out_twice() {
    let mut pool = Pool::new(4 << 20).unwrap();
    let mut dice = Dice(0x5eed_0001);
    let mut held: Vec<(Span, u8)> = Vec::new();
    let mut serial = 0u8;
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..30_000 {
        if dice.roll(100) < 55 {
            let length = match dice.roll(4) {
                0 => 4096,
                1 => u32::try_from(1 + dice.roll(11)).unwrap() * 4096,
                2 => u32::try_from(512 * (1 + dice.roll(88))).unwrap(),
                _ => u32::try_from(1 + dice.roll(256)).unwrap() * 4096,
            };
            if let Some(span) = pool.alloc(length) {
                assert_eq!(span.length_bytes(), length);
                assert_eq!(span.address() as usize % 4096, 0);
                serial = serial.wrapping_add(1);
                pool.bytes_mut(span).fill(serial);
                held.push((span, serial));
                taken += 1;
            } else {
                refused += 1;
            }
        } else if !held.is_empty() {
            let place = usize::try_from(dice.roll(held.len() as u64)).unwrap();
            let (span, mark) = held.swap_remove(place);
            assert!(pool.bytes(span).iter().all(|byte| *byte == mark), "someone wrote into a held span");
            assert!(pool.free(span));
            assert!(!pool.free(span), "a second free must be refused");
        }
        if dice.roll(2000) == 0 {
            pool.trim();
        }
        let sum: u64 =
            held.iter().map(|(span, _)| u64::from(span.length_bytes().div_ceil(4096)) * 4096).sum();
        assert_eq!(pool.used_bytes(), sum);
    }
    assert!(taken > 1000 && refused > 10, "{taken} {refused}");
    assert!(pool.used_bytes_max() <= 4 << 20);
}

#[test]
fn all_of_it_can_be_had() {
    let mut pool = Pool::new(2 << 20).unwrap();
    let spans: Vec<Span> = std::iter::from_fn(|| pool.alloc(4096)).collect();
    assert_eq!(spans.len(), 512);
    assert_eq!(pool.alloc(1), None);
    for span in &spans {
        assert!(pool.free(*span));
    }
    let whole = pool.alloc(SPAN_BYTES_MAX).unwrap();
    assert!(pool.alloc(SPAN_BYTES_MAX).is_some());
    assert!(pool.alloc(SPAN_BYTES_MAX).is_none());
    assert!(pool.free(whole));
    assert_eq!(pool.used_bytes_max(), 2 << 20);
    assert_eq!(pool.refused_frees(), 0);
}

#[test]
fn foreign_partial_and_repeated_frees_are_refused() {
    let mut pool = Pool::new(1 << 20).unwrap();
    let mut other = Pool::new(1 << 20).unwrap();
    let span = pool.alloc(3 * 4096).unwrap();
    let neighbour = pool.alloc(4096).unwrap();
    let foreign = other.alloc(4096).unwrap();
    assert!(!pool.free(Span::EMPTY));
    assert!(!pool.free(foreign));
    assert!(!pool.free(span.part(0, 4096).unwrap()), "the first page of three");
    assert!(!pool.free(span.part(4096, 8192).unwrap()), "from the second page on");
    assert!(!pool.free(span.part(512, 4096).unwrap()), "off the page");
    let stretched = Span { address: span.address(), length_bytes: 4 * 4096 };
    assert!(!pool.free(stretched), "over the neighbour");
    assert_eq!(pool.refused_frees(), 6);
    assert!(pool.free(span));
    assert!(pool.free(neighbour));
    assert_eq!(pool.used_bytes(), 0);
}

#[test]
fn trimmed_pages_read_zero_and_held_ones_stay() {
    let mut pool = Pool::new(1 << 20).unwrap();
    let keep = pool.alloc(4096).unwrap();
    let drop = pool.alloc(8192).unwrap();
    pool.bytes_mut(keep).fill(7);
    pool.bytes_mut(drop).fill(9);
    assert!(pool.free(drop));
    assert_eq!(pool.trim(), 8192);
    assert_eq!(pool.trim(), 0, "nothing left to give");
    assert!(pool.bytes(keep).iter().all(|byte| *byte == 7));
    let again = pool.alloc(8192).unwrap();
    assert_eq!(again, drop);
    assert!(pool.bytes(again).iter().all(|byte| *byte == 0));
}

#[test]
fn copies_stay_inside() {
    let mut pool = Pool::new(1 << 20).unwrap();
    let span = pool.alloc(4096).unwrap();
    assert!(pool.copy_in(span, &[5; 4096]));
    assert!(!pool.copy_in(span, &[5; 4097]));
    let mut out = [0; 512];
    assert!(pool.copy_out(span.part(3584, 512).unwrap(), &mut out));
    assert_eq!(out, [5; 512]);
    assert!(!pool.copy_out(span.part(4000, 96).unwrap(), &mut out));
    assert!(pool.fill_zero(span));
    assert!(pool.bytes(span).iter().all(|byte| *byte == 0));
    assert!(!pool.fill_zero(Span::EMPTY));
    assert!(pool.bytes(Span::EMPTY).is_empty());
    assert_eq!(span.part(1, 4096), None);
    assert_eq!(span.part(u32::MAX, 2), None);
}

#[test]
fn impossible_sizes() {
    assert!(Pool::new(0).is_err());
    assert!(Pool::new(POOL_BYTES_MAX + 1).is_err());
    let mut pool = Pool::new(1).unwrap();
    assert_eq!(pool.capacity_bytes(), 1 << 20);
    assert_eq!(pool.alloc(0), None);
    assert_eq!(pool.alloc(SPAN_BYTES_MAX + 1), None);
}
