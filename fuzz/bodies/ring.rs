//! A ring page of any bytes, rewritten while it is read: the backend's end must stay within the ring's arithmetic.
use rings::{Abi, BackRing, Offers, SharedPages, Status};

#[repr(align(4096))]
struct Page([u8; 4096]);

/// Plays one input.
pub fn play(data: &[u8]) {
    let mut page = Box::new(Page([0; 4096]));
    let (steps, bytes) = data.split_at(data.len().min(64));
    let initial = bytes.len().min(4096);
    page.0[..initial].copy_from_slice(&bytes[..initial]);
    let base = page.0.as_mut_ptr();
    let abi = [Abi::X86_64, Abi::X86_32, Abi::Arm][usize::from(steps.first().copied().unwrap_or(0)) % 3];
    // SAFETY: the page outlives the ring, and both are used by this thread alone.
    let mut ring =
        BackRing::resume(unsafe { SharedPages::new(base, 1) }, abi, u32::from(steps.len() as u8) % 40);
    for (n, step) in steps.iter().enumerate() {
        match step % 4 {
            0 => drop(ring.look()),
            1 => {
                if let Some(slot) = ring.take() {
                    let offers = Offers { indirect_segments: 256, barrier: true, discard: true };
                    if let Ok(mut request) = slot.parse(&offers) {
                        let _ = request.describe(bytes);
                        assert!(
                            request.segments.iter(bytes).count() <= 256 && request.length_bytes() <= 1 << 20
                        );
                        let _ = request.check_range(u64::from(*step) << 4);
                    }
                }
            }
            2 => drop(ring.respond(u64::from(*step), *step, Status::Okay)),
            _ => {
                let _ = ring.publish();
                let _ = ring.rest();
                // The guest writes wherever it likes.
                let at = (usize::from(*step) * 61 + n * 7) % 4096;
                // SAFETY: within the page; the ring reads it through volatile accesses of this same thread.
                unsafe { base.add(at).write_volatile(bytes.get(n).copied().unwrap_or(*step)) };
            }
        }
        assert!(ring.unanswered() <= ring.entries());
    }
}
