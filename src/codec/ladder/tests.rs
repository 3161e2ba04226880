use super::*;
use crate::codec::CodecId;

const MBIT: f64 = 1e6 / 8.0;

fn fresh_choice(link_mbit: f64) -> CodecChoice {
    Ladder::default().choose(link_mbit * MBIT, 1)
}

#[test]
fn the_slower_the_link_the_denser_the_codec() {
    let page = |mbit| fresh_choice(mbit).page;
    assert_eq!(page(25.0), PageCodec::Zstd { level: 9 });
    assert_eq!(page(200.0), PageCodec::Zstd { level: 6 });
    assert_eq!(page(500.0), PageCodec::Zstd { level: 3 });
    assert_eq!(page(1_200.0), PageCodec::Zstd { level: 1 });
    assert_eq!(page(2_800.0), PageCodec::Lz4);
    assert_eq!(page(25_000.0), PageCodec::Raw);
    let delta = |mbit| fresh_choice(mbit).delta;
    assert_eq!(delta(25.0), DeltaCodec::ZstdOld { level: 9 });
    assert_eq!(delta(70.0), DeltaCodec::ZstdOld { level: 6 });
    assert_eq!(delta(250.0), DeltaCodec::ZstdOld { level: 3 });
    assert_eq!(delta(350.0), DeltaCodec::ZstdOld { level: 1 });
    assert_eq!(delta(600.0), DeltaCodec::Zstd { level: 1 });
    assert_eq!(delta(1_500.0), DeltaCodec::Lz4);
    assert_eq!(delta(10_000.0), DeltaCodec::Plain);
}

#[test]
fn in_pre_copy_dense_codecs_build_on_kin() {
    let page = |mbit: f64| Ladder::with_kin().choose(mbit * MBIT, 1).page;
    assert_eq!(page(3.0), PageCodec::ZstdKin { level: 18 });
    assert_eq!(page(6.0), PageCodec::ZstdKin { level: 16 });
    assert_eq!(page(25.0), PageCodec::ZstdKin { level: 9 });
    assert_eq!(page(200.0), PageCodec::ZstdKin { level: 5 });
    assert_eq!(page(350.0), PageCodec::ZstdKin { level: 3 });
    assert_eq!(page(1_200.0), PageCodec::Zstd { level: 1 });
    assert_eq!(page(25_000.0), PageCodec::Raw);
}

#[test]
fn more_cores_afford_denser_codecs() {
    let mut ladder = Ladder::default();
    assert_eq!(ladder.choose(1_200.0 * MBIT, 1).page, PageCodec::Zstd { level: 1 });
    assert_eq!(ladder.choose(1_200.0 * MBIT, 8).page, PageCodec::Zstd { level: 6 });
}

#[test]
fn several_cores_afford_optimal_parsing_on_a_slow_link() {
    let page = |mbit: f64| Ladder::with_kin().choose(mbit * MBIT, 8).page;
    assert_eq!(page(25.0), PageCodec::ZstdKin { level: 18 });
    assert_eq!(page(50.0), PageCodec::ZstdKin { level: 16 });
    assert_eq!(page(100.0), PageCodec::ZstdKin { level: 9 });
}

#[test]
fn bulk_is_never_slower_than_raw() {
    for mbit in (0..200).map(|i| 1.1f64.powi(i)) {
        for slowness in [0.3, 1.0, 5.0, 50.0] {
            let mut ladder = Ladder { slowness, ..Ladder::default() };
            let link = mbit * MBIT;
            let page = ladder.choose(link, 1).page;
            let rung = find(&PAGES, |codec| codec == page).unwrap();
            let moves = (rung.encode_mb_per_s * 1e6 / slowness).min(link / rung.ratio);
            let raw = (PAGES[0].encode_mb_per_s * 1e6 / slowness).min(link);
            assert!(moves * SWITCH_GAIN >= raw, "{page:?} at {mbit} Mbit/s: {moves} < {raw}");
        }
    }
}

#[test]
fn a_machine_slower_than_the_tables_gets_a_quicker_codec() {
    let mut ladder = Ladder::default();
    let choice = ladder.choose(200.0 * MBIT, 1);
    assert_eq!(choice.page, PageCodec::Zstd { level: 6 });
    let mut counts = CodecCounts::default();
    counts.add(CodecId::Zstd, 64, 64 * 4096 * 329 / 1000);
    for _ in 0..200 {
        // Five times as long as the 2.4 ms that 64 pages should take.
        ladder.observe(choice, &counts, Duration::from_micros(11_920));
    }
    assert!((ladder.slowness - 5.0).abs() < 0.2, "{}", ladder.slowness);
    assert_eq!(ladder.choose(200.0 * MBIT, 1).page, PageCodec::Zstd { level: 1 });
}

#[test]
fn memory_that_does_not_compress_is_not_worth_a_slow_codec() {
    let mut ladder = Ladder::default();
    let choice = ladder.choose(600.0 * MBIT, 1);
    let mut counts = CodecCounts::default();
    counts.add(CodecId::Raw, 64, 64 * 4096);
    for _ in 0..300 {
        ladder.observe(choice, &counts, Duration::from_micros(690));
    }
    let choice = ladder.choose(5_000.0 * MBIT, 1);
    assert_eq!(choice.page, PageCodec::Raw);
    // And when it does again, that is found out.
    for _ in 0..600 {
        ladder.observe(choice, &counts, Duration::from_micros(40));
    }
    assert_ne!(ladder.choose(600.0 * MBIT, 1).page, PageCodec::Raw);
}

#[test]
fn what_one_codec_does_not_compress_is_not_tried_with_all_of_them() {
    let mut ladder = Ladder::default();
    let mut tried = Vec::new();
    for _ in 0..400 {
        let choice = ladder.choose(5_000.0 * MBIT, 2);
        let rung = find(&PAGES, |codec| codec == choice.page).unwrap();
        let mut counts = CodecCounts::default();
        counts.add(CodecId::Raw, 64, 64 * 4096);
        let seconds = 64.0 * 4096.0 / (rung.encode_mb_per_s * 1e6);
        ladder.observe(choice, &counts, Duration::from_secs_f64(seconds));
        tried.push(choice.page);
    }
    assert_eq!(tried[0], PageCodec::Lz4);
    let trials = tried[1..].iter().filter(|codec| **codec != PageCodec::Raw).count();
    assert!(trials <= 4, "{trials} of 400");
}

#[test]
fn a_slow_link_loses_little_to_packed_data_among_pages_that_compress() {
    let mut ladder = Ladder::default();
    let mut raw_batches = 0;
    for batch in 0..400 {
        let choice = ladder.choose(100.0 * MBIT, 2);
        let rung = find(&PAGES, |codec| codec == choice.page).unwrap();
        let mut counts = CodecCounts::default();
        // 5 MB of an archive, and 100 MB of text.
        let left = if batch < 20 || choice.page == PageCodec::Raw { 1.0 } else { rung.ratio };
        counts.add(CodecId::Zstd, 64, (64.0 * 4096.0 * left) as u64);
        let seconds = 64.0 * 4096.0 / (rung.encode_mb_per_s * 1e6);
        ladder.observe(choice, &counts, Duration::from_secs_f64(seconds));
        raw_batches += u32::from(batch >= 20 && choice.page == PageCodec::Raw);
    }
    assert!(raw_batches <= 5, "{raw_batches} of 380");
}

#[test]
fn small_changes_of_the_link_do_not_change_the_codec() {
    let mut ladder = Ladder::default();
    let first = ladder.choose(400.0 * MBIT, 1);
    for i in 0..100 {
        let wobble = 1.0 + f64::from(i % 5 - 2) * 0.01;
        assert_eq!(ladder.choose(400.0 * MBIT * wobble, 1), first);
    }
}

#[test]
fn fault_replies_weigh_encoding_against_sending() {
    let ladder = Ladder::default();
    let slow = ladder.choose_for_fault(25.0 * MBIT);
    assert_eq!(slow.page, PageCodec::Zstd { level: 1 });
    assert_eq!(slow.delta, DeltaCodec::ZstdOld { level: 1 });
    let fast = ladder.choose_for_fault(40_000.0 * MBIT);
    assert_eq!(fast, CodecChoice { page: PageCodec::Raw, delta: DeltaCodec::Plain });
}

#[test]
fn choices_are_read_as_they_are_written() {
    for text in ["raw/plain", "lz4/off", "zstd:3/zstd-old:1", "zstd:-5/zstd:19", "lz4/xbzrle"] {
        assert_eq!(text.parse::<CodecChoice>().unwrap().to_string(), text);
    }
    assert_eq!("zstd:6".parse::<CodecChoice>().unwrap().to_string(), "zstd:6/zstd-old:6");
    assert_eq!("xbzrle".parse::<CodecChoice>().unwrap().to_string(), "raw/xbzrle");
    assert_eq!("lz4".parse::<CodecChoice>().unwrap(), CodecChoice::default());
    for bad in
        ["", "zstd", "zstd:99", "raw:1", "lz4/", "lz4/x", "xbzrle:1", "gzip", "zstd:3/zstd-old"]
    {
        assert!(bad.parse::<CodecChoice>().is_err(), "{bad}");
    }
}

#[test]
fn what_nothing_compresses_goes_as_it_is_where_the_link_is_the_limit_too_until_it_compresses() {
    let mut ladder = Ladder::default();
    let mut raw_of_a_hundred = |coded_share: f64| {
        let mut raw = 0;
        for _ in 0..10_000 {
            let choice = ladder.choose(3_000.0 * MBIT, 8);
            let rung = find(&PAGES, |codec| codec == choice.page).unwrap();
            let share = if choice.page == PageCodec::Raw { 1.0 } else { coded_share };
            let mut counts = CodecCounts::default();
            counts.add(CodecId::Zstd, 64, (64.0 * 4096.0 * share) as u64);
            let seconds = 64.0 * 4096.0 / (rung.encode_mb_per_s * 1e6);
            ladder.observe(choice, &counts, Duration::from_secs_f64(seconds));
            raw += u32::from(choice.page == PageCodec::Raw);
        }
        raw / 100
    };
    assert!(raw_of_a_hundred(1.0) >= 80);
    assert!(raw_of_a_hundred(0.4) <= 20);
}
