//! Which bytes of a read have come: a server may send them in pieces, in any order, and each once.

/// Pieces that do not touch each other, at most. A server that goes from the front to the back never makes two.
const PIECES_MAX: usize = 8;

/// Bytes of one read that have come.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Coverage {
    pieces: [(u32, u32); PIECES_MAX],
    count: usize,
}

impl Coverage {
    /// Bytes `from..to` come now. False when some of them came before, or when it is all in too many pieces.
    pub(super) fn add(&mut self, from: u32, to: u32) -> bool {
        let (mut from, mut to) = (from, to);
        let mut kept = [(0, 0); PIECES_MAX];
        let mut count = 0;
        for piece in self.pieces.iter().take(self.count) {
            if piece.0 < to && from < piece.1 {
                return false;
            }
            if piece.1 == from {
                from = piece.0;
            } else if piece.0 == to {
                to = piece.1;
            } else if let Some(place) = kept.get_mut(count) {
                *place = *piece;
                count += 1;
            }
        }
        let Some(place) = kept.get_mut(count) else { return false };
        *place = (from, to);
        *self = Coverage { pieces: kept, count: count + 1 };
        true
    }

    /// Whether all of `length` bytes have come.
    pub(super) fn is_whole(&self, length: u32) -> bool {
        self.count == 1 && self.pieces.first() == Some(&(0, length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_once() {
        let mut seed = 9_u64;
        for _ in 0..20_000 {
            let (mut coverage, mut model, mut lost) = (Coverage::default(), [false; 40], false);
            for _ in 0..30 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let from = (seed >> 33) as usize % 40;
                let to = from + 1 + (seed >> 50) as usize % (40 - from);
                let again = model[from..to].iter().any(|there| *there);
                let added = coverage.add(u32::try_from(from).unwrap(), u32::try_from(to).unwrap());
                assert!(!(again && added), "{from}..{to} came twice");
                if added {
                    model[from..to].fill(true);
                } else {
                    lost |= !again;
                }
                assert_eq!(coverage.is_whole(40), model == [true; 40]);
            }
            let runs = model.windows(2).filter(|pair| pair[0] != pair[1]).count();
            assert!(!lost || runs >= PIECES_MAX, "{runs} runs are not too many");
        }
    }
}
