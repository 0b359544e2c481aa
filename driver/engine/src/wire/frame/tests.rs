//! Properties and edges of the frame parser.

use proptest::prelude::*;

use super::*;

const LAYOUT: [u64; 3] = [1 << 30, 64 << 10, 2 << 20];

fn any_frame() -> impl Strategy<Value = Frame> {
    let pages = 1..=(MAX_PAYLOAD as u64 / PAGE);
    let offset = (0..=u64::MAX / PAGE).prop_map(|page| page * PAGE);
    prop_oneof![
        (any::<u16>(), offset.clone(), pages).prop_map(|(block, offset, pages)| Frame::Data {
            block,
            offset,
            length: (pages * PAGE) as u32,
        }),
        (
            any::<u16>(),
            offset.clone(),
            1..=(MAX_PAYLOAD as u64 / PAGE),
            any::<u32>()
        )
            .prop_map(|(block, offset, pages, length)| {
                let span = (pages * PAGE) as u32;
                Frame::Packed {
                    block,
                    offset,
                    length: 1 + length % (span - 1),
                    span,
                }
            }),
        (any::<u16>(), offset, 1..=u64::MAX / PAGE).prop_map(|(block, offset, pages)| Frame::Zero {
            block,
            offset,
            span: pages * PAGE,
        }),
        any::<u64>().prop_map(|round| Frame::Barrier { round }),
        Just(Frame::End),
        any::<u64>().prop_map(|bytes| Frame::Ack { bytes }),
        (0..=i32::MAX).prop_map(|errno| Frame::Reject(Rejection::Apply { errno })),
        prop_oneof![Just(0u16), 4..=u16::MAX].prop_map(|code| Frame::Reject(Rejection::Other(code))),
        Just(Frame::Reject(Rejection::Protocol)),
        Just(Frame::Reject(Rejection::Mismatch)),
    ]
}

/// Headers that come far into the parser: good ones with a few bytes changed.
fn mutated() -> impl Strategy<Value = [u8; HEADER_LENGTH]> {
    let changes = prop::collection::vec((0..HEADER_LENGTH, any::<u8>()), 0..4);
    (any_frame(), 0..4u64, changes).prop_map(|(frame, sequence, changes)| {
        let mut header = frame.encode(sequence);
        for (at, value) in changes {
            header[at] = value;
        }
        header
    })
}

proptest! {
    #[test]
    fn what_is_encoded_decodes_to_the_same(frame in any_frame(), sequence: u64) {
        prop_assert_eq!(Frame::decode(&frame.encode(sequence)), Ok((frame, sequence)));
    }

    #[test]
    fn every_header_has_one_encoding(header in mutated()) {
        if let Ok((frame, sequence)) = Frame::decode(&header) {
            prop_assert_eq!(frame.encode(sequence), header);
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
        let _ = walk(&bytes, &LAYOUT);
        if let Some((header, _)) = bytes.split_first_chunk() {
            let _ = crate::wire::chunk::decode(header);
        }
    }

    #[test]
    fn mutated_streams_never_panic_nor_leave_the_guest(headers in prop::collection::vec(mutated(), 0..8)) {
        let mut checker = Checker::new(&LAYOUT);
        for header in &headers {
            let (block, offset, span) = match checker.admit(header) {
                Ok(Frame::Data { block, offset, length }) => (block, offset, u64::from(length)),
                Ok(Frame::Zero { block, offset, span }) => (block, offset, span),
                Ok(Frame::Packed { block, offset, span, .. }) => (block, offset, u64::from(span)),
                _ => continue,
            };
            prop_assert!(u128::from(offset) + u128::from(span) <= u128::from(LAYOUT[usize::from(block)]));
            prop_assert!(offset % PAGE == 0 && span % PAGE == 0 && span > 0);
        }
        let _ = walk(&headers.concat(), &LAYOUT);
    }
}

fn admit(frame: Frame) -> Result<Frame, Invalid> {
    Checker::new(&LAYOUT).admit(&frame.encode(1))
}

#[test]
fn the_edges_of_a_block_are_exact() {
    let last = Frame::Data {
        block: 1,
        offset: 60 << 10,
        length: 4096,
    };
    assert_eq!(admit(last), Ok(last));
    let outside = |block, offset, span| Err(Invalid::Outside { block, offset, span });
    assert_eq!(
        admit(Frame::Data {
            block: 1,
            offset: 60 << 10,
            length: 8192
        }),
        outside(1, 60 << 10, 8192)
    );
    assert_eq!(
        admit(Frame::Zero {
            block: 1,
            offset: 64 << 10,
            span: 4096
        }),
        outside(1, 64 << 10, 4096)
    );
    let far = u64::MAX - 4095;
    assert_eq!(
        admit(Frame::Zero {
            block: 0,
            offset: far,
            span: far
        }),
        outside(0, far, far)
    );
    assert_eq!(
        admit(Frame::Zero {
            block: 3,
            offset: 0,
            span: 4096
        }),
        Err(Invalid::Block(3))
    );
    let whole = Frame::Zero {
        block: 0,
        offset: 0,
        span: 1 << 30,
    };
    assert_eq!(admit(whole), Ok(whole));
}

#[test]
fn lengths_spans_and_alignment_are_checked() {
    let data = |offset, length| {
        admit(Frame::Data {
            block: 0,
            offset,
            length,
        })
    };
    assert_eq!(data(0, (1 << 20) + 4096), Err(Invalid::Length((1 << 20) + 4096)));
    assert_eq!(
        data(0, u32::MAX - 4095),
        Err(Invalid::Length(u64::from(u32::MAX - 4095)))
    );
    assert_eq!(data(0, 0), Err(Invalid::Span(0)));
    assert_eq!(data(0, 4095), Err(Invalid::Alignment(4095)));
    assert_eq!(data(512, 4096), Err(Invalid::Alignment(512)));
    assert_eq!(
        admit(Frame::Zero {
            block: 0,
            offset: 0,
            span: 0
        }),
        Err(Invalid::Span(0))
    );
    let mut header = Frame::Data {
        block: 0,
        offset: 0,
        length: 4096,
    }
    .encode(1);
    header[25] = 0x20; // a span of 8192
    assert_eq!(Checker::new(&LAYOUT).admit(&header), Err(Invalid::Span(8192)));
}

#[test]
fn order_and_direction_are_checked() {
    let mut checker = Checker::new(&LAYOUT);
    let barrier = Frame::Barrier { round: 9 };
    assert_eq!(checker.admit(&barrier.encode(1)), Ok(barrier));
    assert_eq!(
        checker.admit(&barrier.encode(1)),
        Err(Invalid::Sequence { expected: 2, got: 1 })
    );
    assert_eq!(
        checker.admit(&barrier.encode(3)),
        Err(Invalid::Sequence { expected: 2, got: 3 })
    );
    assert_eq!(
        checker.admit(&Frame::Ack { bytes: 0 }.encode(2)),
        Err(Invalid::Direction)
    );
    assert_eq!(checker.admit(&Frame::End.encode(2)), Ok(Frame::End));
    assert_eq!(checker.admit(&barrier.encode(3)), Err(Invalid::AfterEnd));
    assert_eq!(checker.last(), 2);
}

#[test]
fn a_whole_stream_walks() {
    let mut stream = Vec::new();
    stream.extend_from_slice(
        &Frame::Data {
            block: 2,
            offset: 4096,
            length: 8192,
        }
        .encode(1),
    );
    stream.extend_from_slice(&[1; 8192]);
    stream.extend_from_slice(
        &Frame::Zero {
            block: 0,
            offset: 0,
            span: 1 << 20,
        }
        .encode(2),
    );
    stream.extend_from_slice(&Frame::End.encode(3));
    stream.extend_from_slice(&[0; END_PAYLOAD]);
    assert_eq!(walk(&stream, &LAYOUT), Ok(3));
    assert_eq!(walk(&stream[..stream.len() - 1], &LAYOUT), Ok(2));
    assert_eq!(walk(&stream[..100], &LAYOUT), Ok(0));
    assert_eq!(walk(&stream[1..], &LAYOUT), Err(Invalid::Magic(0x0146)));
}
