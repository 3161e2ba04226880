use super::*;

const TEXT: &str = r#"
    title = "a test"
    repeat = 2
    [[guest]]
    name = "small"
    memory = "256MiB"
    working_set = "64MiB"
    work = "sparse"
    rate = 1000
    [[guest]]
    name = "native"
    kind = "threads"
    memory = "16MiB"
    work = "sparse"
    rate = 1000
    [[link]]
    name = "lan"
    link = "1Gbit,1ms"
    [[method]]
    name = "farfault"
    send = ["--strategy", "hybrid"]
    [[method]]
    name = "xbzrle"
    qemu = "xbzrle"
"#;

fn names(cells: &[Cell]) -> Vec<String> {
    cells.iter().map(|cell| format!("{} {}", cell.name(), cell.repetition)).collect()
}

#[test]
fn the_matrix_is_run_whole_before_it_is_repeated_and_without_what_cannot_be() {
    let cells = Scenario::parse(TEXT).unwrap().runs(&[]);
    assert_eq!(cells.len(), 6);
    for (repetition, cells) in (1..).zip(cells.chunks(3)) {
        let mut names = names(cells);
        names.sort();
        let all = ["native/lan/farfault", "small/lan/farfault", "small/lan/xbzrle"];
        assert_eq!(names, all.map(|name| format!("{name} {repetition}")));
    }
}

#[test]
fn the_order_is_the_seeds_and_a_part_can_be_chosen() {
    let mut scenario = Scenario::parse(&TEXT.replace("repeat = 2", "repeat = 9")).unwrap();
    let order = names(&scenario.runs(&[]));
    assert_eq!(order, names(&scenario.runs(&[])));
    scenario.seed = 2;
    assert_ne!(order, names(&scenario.runs(&[])));
    let part = scenario.runs(&["xbzrle".to_owned()]);
    assert_eq!(part.len(), 9);
    assert!(part.iter().all(|cell| cell.name() == "small/lan/xbzrle"));
}

#[test]
fn what_cannot_be_tried_is_refused_with_its_place() {
    for (from, to, word) in [
        (
            "working_set = \"64MiB\"\n    work = \"sparse\"",
            "working_set = \"160MiB\"\n    work = \"redis\"",
            "redis",
        ),
        ("work = \"sparse\"", "work = \"spase\"", "hotcold"),
        ("1Gbit,1ms", "fast", "write it like"),
        ("qemu = \"xbzrle\"", "qemu = \"xbzle\"", "multifd-zstd"),
        ("qemu = \"xbzrle\"", "qemu = \"xbzrle\"\nsend = []", "either send"),
        ("\"hybrid\"]", "\"hybrid\"]\n    arguments = [\"-S\"]", "for QEMU's methods"),
        ("\"hybrid\"]", "\"hybrid\"]\n    tls = true", "for QEMU's methods"),
        ("1ms\"", "1ms\"\nmtu = 9000", "an emulated link has one of 1500"),
        ("name = \"native\"", "name = \"small\"", "same name"),
        ("name = \"lan\"", "name = \"a/b\"", "letters"),
        ("64MiB", "250MiB", "leave the guest's kernel"),
        ("64MiB\"", "64MiB\"\n    usable = \"100MiB\"", "leave the guest's kernel"),
        ("64MiB\"", "64MiB\"\n    usable = \"1TiB\"", "usable: whole MiB of memory"),
        ("repeat = 2", "repeat = 0", "at least 1"),
        ("repeat = 2", "repeats = 2", "unknown field"),
        ("1ms\"", "1ms\"\nqueue = \"10bdp\"", "built-in"),
        ("1Gbit,1ms\"", "none\"\nqueue = \"10bdp\"", "only an emulated link has one"),
        (
            "working_set = \"64MiB\"\n    work = \"sparse\"",
            "working_set = \"80MiB\"\n    usable = \"160MiB\"\n    work = \"redis\"",
            "redis",
        ),
        ("64MiB", "60KiB", "at least 64KiB"),
        ("\"16MiB\"", "\"16MiB\"\n    fill = \"random\"", "fill is for guests in QEMU"),
        ("\"16MiB\"", "\"16MiB\"\n    verify = 1", "verify is for guests in QEMU"),
        ("repeat = 2", "downtime = \"0.5ms\"", "whole milliseconds"),
        ("repeat = 2", "downtime = \"1.5ms\"", "whole milliseconds"),
        ("\"hybrid\"]", "\"hybrid\", \"--downtime=soon\"]", "--downtime"),
        ("\"hybrid\"]", "\"hybrid\", \"--downtime\"]", "--downtime"),
    ] {
        let error = Scenario::parse(&TEXT.replacen(from, to, 1)).unwrap_err();
        assert!(format!("{error:#}").contains(word), "{to}: {error:#}");
    }
}

#[test]
fn what_no_guest_or_method_would_notice_is_refused() {
    let refused = |text: &str| format!("{:#}", Scenario::parse(text).unwrap_err());
    for option in ["trace", "estimate", "ready_memory"] {
        let text = TEXT.replace("repeat = 2", &format!("{option} = true"));
        Scenario::parse(&text).unwrap();
        let (begin, rest) = text.split_once("[[guest]]").unwrap();
        let (_, rest) = rest.split_once("[[guest]]").unwrap();
        let builtin = format!("{begin}[[guest]]{rest}");
        assert!(refused(&builtin).starts_with(&format!("{option}: ")), "{builtin}");
    }
    let text = TEXT.replace("repeat = 2", "estimate = true");
    let theirs = text.replace("send = [\"--strategy\", \"hybrid\"]", "qemu = \"precopy\"");
    assert!(refused(&theirs).starts_with("estimate: "));
}

#[test]
fn a_method_may_have_a_downtime_of_its_own() {
    let mut scenario = Scenario::parse(TEXT).unwrap();
    assert_eq!(scenario.downtime_of(&scenario.method[0]), "300ms");
    for words in [&["--downtime", "50ms"][..], &["--strategy", "hybrid", "--downtime=50ms"]] {
        scenario.method[0].send = Some(words.iter().map(|&word| word.to_owned()).collect());
        assert_eq!(scenario.downtime_of(&scenario.method[0]), "50ms");
        let own = scenario.method[0].downtime().unwrap();
        assert_eq!(own, Some(Duration::from_millis(50)));
    }
}
