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
    ] {
        let error = Scenario::parse(&TEXT.replacen(from, to, 1)).unwrap_err();
        assert!(format!("{error:#}").contains(word), "{to}: {error:#}");
    }
}
