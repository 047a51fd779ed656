use super::*;
use crate::segment::INDIRECT_SEGMENTS_MAX;

const ALL: Offers = Offers { indirect_segments: INDIRECT_SEGMENTS_MAX, barrier: true, discard: true };

fn direct(request: &Request) -> &[Segment] {
    match &request.segments {
        Segments::Direct(segments) => segments,
        Segments::Indirect(_) => panic!("{request:?}"),
    }
}

/// Offsets written out by hand from blkif.h, not taken from `Layout`.
fn slot(abi: Abi, op: u8, nseg: u8, id: u64, sector: u64, segments: &[(u32, u8, u8)]) -> Slot {
    let mut bytes = [0xAA_u8; LARGEST_STRIDE];
    let (id_at, sector_at, segments_at) = if abi == Abi::X86_32 { (4, 12, 20) } else { (8, 16, 24) };
    bytes[0] = op;
    bytes[1] = nseg;
    bytes[id_at..id_at + 8].copy_from_slice(&id.to_le_bytes());
    bytes[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
    for (n, (grant, first, last)) in segments.iter().enumerate() {
        let at = segments_at + n * 8;
        bytes[at..at + 4].copy_from_slice(&grant.to_le_bytes());
        bytes[at + 4] = *first;
        bytes[at + 5] = *last;
    }
    Slot::new(bytes, abi)
}

#[test]
fn a_write_is_read_alike_in_every_abi() {
    for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
        let id = 0xFFFF_8000_1234_5678;
        let parsed = slot(abi, 1, 2, id, 77, &[(9, 0, 7), (0xFFFF_FFFF, 3, 3)]).parse(&Offers::NONE).unwrap();
        assert_eq!((parsed.id, parsed.operation, parsed.sector), (id, Operation::Write, 77));
        assert_eq!(parsed.length_bytes(), 4096 + 512);
        assert_eq!(direct(&parsed)[1], Segment { grant: 0xFFFF_FFFF, first: 3, last: 3 });
        assert_eq!(direct(&parsed)[1].offset_bytes(), 1536);
    }
}

#[test]
fn eleven_segments_fit_and_twelve_do_not() {
    for abi in [Abi::X86_64, Abi::X86_32, Abi::Arm] {
        let eleven = [(5, 0, 7); 11];
        let parsed = slot(abi, 0, 11, 1, 0, &eleven).parse(&Offers::NONE).unwrap();
        assert_eq!(direct(&parsed).len(), 11);
        for count in [12, 13, 255] {
            let refused = slot(abi, 0, count, 1, 0, &eleven).parse(&Offers::NONE);
            assert!(refused.is_err(), "{abi:?} {count}");
        }
    }
}

#[test]
fn malformed_segments_are_refused_with_an_error() {
    for (first, last) in [(1, 0), (0, 8), (7, 255), (255, 255), (8, 8)] {
        let refusal = slot(Abi::X86_64, 0, 1, 1, 0, &[(1, first, last)]).parse(&Offers::NONE).unwrap_err();
        assert_eq!(refusal, Refusal::SegmentSectors(first, last));
        assert_eq!(refusal.status().code(), -1);
    }
    let refusal = slot(Abi::X86_64, 1, 0, 1, 0, &[]).parse(&Offers::NONE).unwrap_err();
    assert_eq!(refusal, Refusal::SegmentCount(0));
}

#[test]
fn what_is_not_offered_is_unsupported() {
    for op in (2..=255).filter(|op| *op != operation::FLUSH) {
        let refusal = slot(Abi::X86_64, op, 1, 1, 0, &[(1, 0, 0)]).parse(&Offers::NONE).unwrap_err();
        assert_eq!((refusal, refusal.status().code()), (Refusal::Unsupported(op), -2));
    }
}

#[test]
fn a_flush_may_have_data_or_none() {
    let bare = slot(Abi::X86_64, 3, 0, 1, u64::MAX, &[]).parse(&Offers::NONE).unwrap();
    assert_eq!((bare.operation, bare.check_range(0)), (Operation::Flush, Ok(())));
    let full = slot(Abi::X86_64, 3, 1, 1, 8, &[(1, 0, 7)]).parse(&Offers::NONE).unwrap();
    assert_eq!((full.check_range(15), full.check_range(16)), (Err(Refusal::Range(8)), Ok(())));
}

#[test]
fn ranges_end_at_the_disk_and_never_wrap() {
    let request = |sector| slot(Abi::X86_64, 0, 1, 1, sector, &[(1, 0, 7)]).parse(&Offers::NONE).unwrap();
    assert_eq!(request(92).check_range(100), Ok(()));
    for sector in [93, 100, u64::MAX, u64::MAX - 7, u64::MAX / 512] {
        assert_eq!(request(sector).check_range(100), Err(Refusal::Range(sector)));
    }
}

#[test]
fn an_indirect_request_is_answered_with_its_inner_operation() {
    let slot = slot(Abi::X86_64, operation::INDIRECT, operation::WRITE, 9, 0, &[]);
    assert_eq!((slot.response_operation(), slot.id()), (operation::WRITE, 9));
}

const ABIS: [Abi; 3] = [Abi::X86_64, Abi::X86_32, Abi::Arm];

/// An indirect slot, and its first page's grant, at offsets written out by hand from blkif.h.
fn indirect(abi: Abi, inner: u8, count: u16, sector: u64) -> Slot {
    let mut bytes = [0xAA_u8; LARGEST_STRIDE];
    let (id_at, sector_at, grants_at) = if abi == Abi::X86_32 { (4, 12, 24) } else { (8, 16, 28) };
    bytes[..2].copy_from_slice(&[6, inner]);
    bytes[2..4].copy_from_slice(&count.to_le_bytes());
    bytes[id_at..id_at + 8].copy_from_slice(&0x1122_3344_5566_7788_u64.to_le_bytes());
    bytes[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
    bytes[grants_at..grants_at + 4].copy_from_slice(&4711_u32.to_le_bytes());
    Slot::new(bytes, abi)
}

fn discard(abi: Abi, flag: u8, sector: u64, count: u64) -> Slot {
    let mut bytes = [0xAA_u8; LARGEST_STRIDE];
    let (sector_at, count_at) = if abi == Abi::X86_32 { (12, 20) } else { (16, 24) };
    bytes[..2].copy_from_slice(&[5, flag]);
    bytes[sector_at..sector_at + 8].copy_from_slice(&sector.to_le_bytes());
    bytes[count_at..count_at + 8].copy_from_slice(&count.to_le_bytes());
    Slot::new(bytes, abi)
}

#[test]
fn an_indirect_request_is_read_alike_in_every_abi() {
    for abi in ABIS {
        let slot = indirect(abi, operation::WRITE, 256, 92);
        assert_eq!((slot.response_operation(), slot.id()), (operation::WRITE, 0x1122_3344_5566_7788));
        let mut request = slot.parse(&ALL).unwrap();
        let Segments::Indirect(page) = &request.segments else { panic!("{request:?}") };
        assert_eq!((page.count(), page.grant, page.descriptor_bytes()), (256, 4711, 2048));
        assert_eq!(
            (request.operation, request.sector, request.length_bytes()),
            (Operation::Write, 92, 1 << 20)
        );
        let mut page = [0; 4096];
        for (grant, entry) in (0..).zip(page.as_chunks_mut::<8>().0) {
            let first = u8::try_from(grant % 8).unwrap();
            *entry = Segment { grant, first, last: 7 }.to_bytes();
        }
        request.describe(&page[..2048]).unwrap();
        // 1 to 8 sectors each, 36 in eight segments.
        assert_eq!((request.sectors, request.length_bytes()), (36 * 32, 36 * 32 * 512));
        assert_eq!((request.check_range(92 + 36 * 32), request.has_data()), (Ok(()), true));
        assert_eq!(request.check_range(91 + 36 * 32), Err(Refusal::Range(92)));
        assert_eq!(request.segments.iter(&page).count(), 256);
        let last = request.segments.iter(&page).last();
        assert_eq!(last, Some(Segment { grant: 255, first: 7, last: 7 }));
    }
}

#[test]
fn indirect_requests_have_bounds() {
    for abi in ABIS {
        for (count, most) in
            [(0, 256), (257, 256), (u16::MAX, 256), (33, 32), (512, u16::MAX), (257, u16::MAX)]
        {
            let offers = Offers { indirect_segments: most, ..ALL };
            let refusal = indirect(abi, operation::READ, count, 0).parse(&offers).unwrap_err();
            assert_eq!((refusal, refusal.status().code()), (Refusal::SegmentCount(count), -1), "of {most}");
        }
        for inner in (2..=255).filter(|inner| *inner > 1) {
            let refusal = indirect(abi, inner, 1, 0).parse(&ALL).unwrap_err();
            assert_eq!((refusal, refusal.status().code()), (Refusal::InnerOperation(inner), -1));
        }
    }
}

#[test]
fn malformed_descriptors_are_refused_wherever_they_are() {
    let mut request = indirect(Abi::X86_64, operation::READ, 3, 0).parse(&ALL).unwrap();
    let fine = Segment { grant: 1, first: 0, last: 7 };
    for (first, last) in [(1, 0), (0, 8), (255, 255), (7, 255)] {
        for bad in 0..3 {
            let mut page = [fine.to_bytes(); 3];
            page[bad][4..6].copy_from_slice(&[first, last]);
            assert_eq!(request.describe(page.as_flattened()), Err(Refusal::SegmentSectors(first, last)));
        }
    }
    let page = [fine.to_bytes(); 2];
    assert_eq!(
        request.describe(page.as_flattened()),
        Err(Refusal::SegmentCount(3)),
        "a copy that is too short"
    );
    assert_eq!(request.length_bytes(), 3 * 4096, "nothing was taken from what was refused");
}

#[test]
fn a_discard_names_sectors_and_no_data() {
    for abi in ABIS {
        let request = discard(abi, 0, 10, 90).parse(&ALL).unwrap();
        assert_eq!((request.operation, request.sector, request.sectors), (Operation::Discard, 10, 90));
        assert_eq!((request.length_bytes(), request.has_data()), (0, false));
        assert_eq!((request.check_range(100), request.check_range(99)), (Ok(()), Err(Refusal::Range(10))));
        for (sector, count) in [(u64::MAX, 1), (1, u64::MAX), (1 << 63, 1 << 63), (0, u64::MAX)] {
            let request = discard(abi, 0, sector, count).parse(&ALL).unwrap();
            assert_eq!(request.check_range(1 << 40), Err(Refusal::Range(sector)));
        }
        assert_eq!(discard(abi, 0, 10, 0).parse(&ALL), Err(Refusal::Range(10)), "a discard of nothing");
        let secure = discard(abi, 1, 10, 90).parse(&ALL).unwrap_err();
        assert_eq!((secure, secure.status()), (Refusal::DiscardFlags(1), Status::Unsupported));
    }
}

#[test]
fn a_barrier_may_have_data_or_none_where_it_is_offered() {
    for abi in ABIS {
        let bare = slot(abi, operation::BARRIER, 0, 1, u64::MAX, &[]).parse(&ALL).unwrap();
        assert_eq!(
            (bare.operation, bare.has_data(), bare.check_range(0)),
            (Operation::Barrier, false, Ok(()))
        );
        let full = slot(abi, operation::BARRIER, 1, 1, 8, &[(1, 0, 7)]).parse(&ALL).unwrap();
        assert_eq!((full.check_range(15), full.check_range(16)), (Err(Refusal::Range(8)), Ok(())));
    }
}
