//! Both ends of a ring against each other: order, wrapping, notification, and frontends that lie.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rings::front::Response;
use rings::{Abi, BackRing, FrontRing, Segment, SharedPages, Status};

const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];

/// Page-aligned zeroed memory that both ends see.
struct Memory(Box<[Page]>);

#[repr(align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

impl Memory {
    fn new(pages: usize) -> Memory {
        Memory(vec![Page([0; 4096]); pages].into_boxed_slice())
    }

    fn pages(&mut self) -> SharedPages {
        // SAFETY: the tests keep `self` alive and unmoved (a box) longer than every ring made on it.
        unsafe { SharedPages::new(self.0.as_mut_ptr().cast(), self.0.len()) }
    }

    fn byte(&self, at: usize) -> u8 {
        self.0[at / 4096].0[at % 4096]
    }

    fn set(&mut self, at: usize, value: u32) {
        self.0[0].0[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[test]
fn every_request_is_answered_once_in_any_order_across_the_wrap() {
    for seed in 0..30 {
        for abi in ABIS {
            let mut state = seed;
            let mut memory = Memory::new(1 << (seed % 3));
            let mut front = FrontRing::create(memory.pages(), abi);
            let mut back = BackRing::attach(memory.pages(), abi);
            let (mut sent, mut answered, mut held) = (0_u64, 0_u64, Vec::new());
            let mut seen = std::collections::BTreeSet::new();
            for _ in 0..3000 {
                match random(&mut state) % 4 {
                    0 => {
                        for _ in 0..random(&mut state) % 9 {
                            if front.free() > 0 {
                                front.write(1, sent, sent * 8, &[Segment { grant: 7, first: 0, last: 7 }], 1);
                                sent += 1;
                            }
                        }
                        let _ = front.publish();
                    }
                    1 => {
                        back.look().unwrap();
                        while let Some(slot) = back.take() {
                            let request = slot.parse(&rings::Offers::NONE).unwrap();
                            assert_eq!(request.sector, request.id * 8);
                            held.push(request.id);
                        }
                    }
                    2 => {
                        while !held.is_empty() && !random(&mut state).is_multiple_of(3) {
                            let pick = usize::try_from(random(&mut state)).unwrap() % held.len();
                            assert!(back.respond(held.swap_remove(pick), 1, Status::Okay));
                        }
                        let _ = back.publish();
                    }
                    _ => {
                        while let Some(Response { id, operation, status }) = front.take() {
                            assert_eq!((operation, status), (1, 0));
                            assert!(seen.insert(id), "seed {seed}: {id} answered twice");
                            answered += 1;
                        }
                    }
                }
                assert_eq!(back.unanswered() as usize, held.len());
            }
            assert!(answered > 500 && answered <= sent, "seed {seed} {abi:?}: {answered} of {sent}");
        }
    }
}

#[test]
fn no_response_without_a_request() {
    let mut memory = Memory::new(1);
    let mut front = FrontRing::create(memory.pages(), Abi::X86_64);
    let mut back = BackRing::attach(memory.pages(), Abi::X86_64);
    assert!(!back.respond(1, 0, Status::Okay));
    front.write_flush(1);
    let _ = front.publish();
    assert_eq!(back.look(), Ok(1));
    assert!(back.take().is_some() && back.take().is_none());
    assert!(back.respond(1, 3, Status::Okay));
    assert!(!back.respond(1, 3, Status::Okay));
}

#[test]
fn a_producer_outside_the_ring_is_an_overrun_wherever_the_ring_stands() {
    for abi in ABIS {
        let mut memory = Memory::new(1);
        let mut front = FrontRing::create(memory.pages(), abi);
        let mut back = BackRing::attach(memory.pages(), abi);
        // 20 consumed of which 10 are answered: 22 more may wait, index 42 is the last allowed.
        for id in 0..20 {
            front.write_flush(id);
        }
        let _ = front.publish();
        assert_eq!(back.look(), Ok(20));
        for id in 0..20 {
            assert!(back.take().is_some());
            if id < 10 {
                assert!(back.respond(id, 3, Status::Okay));
            }
        }
        let _ = back.publish();
        for allowed in [20, 21, 42] {
            front.force_request_producer(allowed);
            assert_eq!(back.look(), Ok(allowed - 20));
        }
        // Rewinding into what was consumed but not answered is as false as running ahead.
        for wild in [43, 52, 1000, u32::MAX, 0, 5, 10, 15, 19, 1 << 31] {
            front.force_request_producer(wild);
            let overrun = back.look().unwrap_err();
            assert_eq!((overrun.request_producer, overrun.requests_consumed), (wild, 20));
            assert_eq!(back.rest().unwrap_err().responses_produced, 10);
        }
    }
}

#[test]
fn responses_overwrite_nothing_of_theirs_with_ours() {
    for abi in ABIS {
        let mut memory = Memory::new(1);
        let mut front = FrontRing::create(memory.pages(), abi);
        let mut back = BackRing::attach(memory.pages(), abi);
        front.write_raw(&[0xEE; 112]);
        let _ = front.publish();
        assert_eq!(back.look(), Ok(1));
        let slot = back.take().unwrap();
        assert!(back.respond(slot.id(), slot.response_operation(), Status::Unsupported));
        let (padding, size, stride) = if abi == Abi::X86_32 { (9..10, 12, 108) } else { (9..10, 16, 112) };
        assert!(padding.chain(12..size).all(|at| memory.byte(64 + at) == 0), "{abi:?}: padding is zero");
        assert!((size..stride).all(|at| memory.byte(64 + at) == 0xEE), "{abi:?}: rest is the guest's own");
        assert_eq!(memory.byte(64 + stride), 0, "{abi:?}: next entry untouched");
    }
}

#[test]
fn events_are_asked_for_and_sent_as_the_macros_of_ring_h_do() {
    let mut memory = Memory::new(1);
    let mut front = FrontRing::create(memory.pages(), Abi::X86_64);
    let mut back = BackRing::attach(memory.pages(), Abi::X86_64);
    let send = |front: &mut FrontRing, n: u64| {
        (0..n).for_each(|id| front.write_flush(id));
        front.publish()
    };
    assert!(send(&mut front, 1), "req_event starts at 1: the first request is announced");
    assert!(!send(&mut front, 1), "the backend has not asked again");
    assert_eq!(back.rest(), Ok(2));
    while back.take().is_some() {}
    assert_eq!(back.rest(), Ok(0));
    assert!(send(&mut front, 3));
    assert!(back.respond(0, 3, Status::Okay));
    assert!(back.publish(), "rsp_event starts at 1");
    assert!(back.respond(1, 3, Status::Okay));
    assert!(!back.publish(), "the frontend has not asked again");
    assert!(!back.publish(), "nothing new");
    assert!(front.take().is_some() && front.take().is_some() && front.take().is_none());
    assert_eq!(back.look(), Ok(3));
    assert!(back.take().is_some() && back.respond(2, 3, Status::Okay));
    assert!(back.publish());
    front.force_response_event(u32::MAX);
    assert!(back.take().is_some() && back.respond(3, 3, Status::Okay));
    assert!(!back.publish(), "a junk event index costs only that guest its events");
}

#[test]
fn a_successor_goes_on_where_the_ring_stands() {
    let mut memory = Memory::new(1);
    let mut front = FrontRing::create(memory.pages(), Abi::X86_32);
    let mut back = BackRing::attach(memory.pages(), Abi::X86_32);
    for round in 0..100_u64 {
        front.write_flush(round);
        let _ = front.publish();
        assert_eq!(back.look(), Ok(1), "round {round}");
        assert!(back.take().is_some() && back.respond(round, 3, Status::Okay));
        let _ = back.publish();
        assert_eq!(front.take().map(|response| response.id), Some(round));
        let counters = back.counters();
        back = BackRing::resume(memory.pages(), Abi::X86_32, 0);
        assert_eq!(back.counters(), counters);
    }
}

#[test]
fn a_successor_owes_what_its_predecessor_had_taken() {
    let mut memory = Memory::new(1);
    let mut front = FrontRing::create(memory.pages(), Abi::X86_64);
    let mut back = BackRing::attach(memory.pages(), Abi::X86_64);
    (0..10).for_each(|id| front.write_flush(id));
    let _ = front.publish();
    assert_eq!(back.look(), Ok(10));
    assert_eq!(std::iter::from_fn(|| back.take()).take(7).count(), 7);
    assert!(back.respond(3, 3, Status::Okay) && back.respond(5, 3, Status::Okay));
    let _ = back.publish();
    let mut back = BackRing::resume(memory.pages(), Abi::X86_64, 5);
    assert_eq!((back.unanswered(), back.next_response(), back.look()), (5, 2, Ok(3)));
    let rest: Vec<u64> = std::iter::from_fn(|| back.take()).map(|slot| slot.id()).collect();
    assert_eq!(rest, [7, 8, 9]);
    for id in [0, 1, 2, 4, 6, 7, 8, 9] {
        assert!(back.respond(id, 3, Status::Okay));
    }
    let _ = back.publish();
    let mut answered: Vec<u64> = std::iter::from_fn(|| front.take()).map(|response| response.id).collect();
    answered.sort_unstable();
    assert_eq!(answered, (0..10).collect::<Vec<u64>>());
}

#[test]
fn indices_wrap_at_two_to_the_32() {
    let mut memory = Memory::new(1);
    drop(FrontRing::create(memory.pages(), Abi::X86_64));
    memory.set(8, u32::MAX - 3);
    memory.set(0, u32::MAX - 3);
    let mut back = BackRing::resume(memory.pages(), Abi::X86_64, 0);
    for step in 0..10_u32 {
        memory.set(0, (u32::MAX - 2).wrapping_add(step));
        assert_eq!(back.look(), Ok(1));
        assert!(back.take().is_some() && back.respond(1, 3, Status::Okay));
        let _ = back.publish();
    }
    assert_eq!(back.counters(), (6, 6));
}

/// An event channel as far as the ring is concerned: sticky, and waking.
#[derive(Default)]
struct Doorbell(Mutex<bool>, Condvar, AtomicU32);

impl Doorbell {
    fn ring(&self) {
        *self.0.lock().unwrap() = true;
        self.2.fetch_add(1, Ordering::Relaxed);
        self.1.notify_one();
    }

    fn wait(&self) {
        let guard = self.0.lock().unwrap();
        let limit = std::time::Duration::from_secs(30);
        let (mut guard, timeout) = self.1.wait_timeout_while(guard, limit, |rung| !*rung).unwrap();
        assert!(!timeout.timed_out(), "a wake-up was lost");
        *guard = false;
    }
}

#[test]
fn no_wake_up_is_lost_between_two_processors() {
    const REQUESTS: u64 = 200_000;
    let mut memory = Memory::new(1);
    let (front_pages, back_pages) = (memory.pages(), memory.pages());
    let mut front = FrontRing::create(front_pages, Abi::X86_64);
    let mut back = BackRing::attach(back_pages, Abi::X86_64);
    let (to_back, to_front) = (Arc::new(Doorbell::default()), Arc::new(Doorbell::default()));
    let finished = Arc::new(AtomicBool::new(false));
    struct Carry<T>(T);
    // SAFETY: the rings touch the shared page only through atomics and volatile accesses of disjoint entries.
    unsafe impl<T> Send for Carry<T> {}
    std::thread::scope(|scope| {
        let (bell_in, bell_out, stop) = (to_back.clone(), to_front.clone(), finished.clone());
        let mut carried = Carry((&mut back, ()));
        scope.spawn(move || {
            let carried = &mut carried;
            let back: &mut BackRing = carried.0.0;
            while !stop.load(Ordering::Acquire) {
                while back.look().unwrap() > 0 {
                    while let Some(slot) = back.take() {
                        assert!(back.respond(slot.id(), slot.operation(), Status::Okay));
                    }
                    if back.publish() {
                        bell_out.ring();
                    }
                }
                if back.rest().unwrap() == 0 && !stop.load(Ordering::Acquire) {
                    bell_in.wait();
                }
            }
        });
        let (mut sent, mut answered, mut state) = (0, 0, 1);
        while answered < REQUESTS {
            for _ in 0..random(&mut state) % 33 {
                if front.free() > 0 && sent < REQUESTS {
                    front.write_flush(sent);
                    sent += 1;
                }
            }
            if front.publish() {
                to_back.ring();
            }
            let before = answered;
            while front.take().is_some() {
                answered += 1;
            }
            if answered == before && sent > answered {
                to_front.wait();
            }
        }
        finished.store(true, Ordering::Release);
        to_back.ring();
    });
    assert!(to_back.2.load(Ordering::Relaxed) < u32::try_from(REQUESTS).unwrap(), "events are suppressed");
}
