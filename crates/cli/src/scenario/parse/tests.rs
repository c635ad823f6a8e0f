use super::*;

/// What is said of a scenario with this line in it, which is the third of its file.
fn said_of(line: &str) -> String {
    let text = format!("# remark\nscenario 1 title\n  {line}\n  map a 2M\n");
    match parse("some.scn", &text) {
        Ok(_) => format!("`{line}` is read"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn bad_lines_are_told_with_their_place_and_what_is_wrong() {
    for (line, what) in [
        ("frobnicate a", "`frobnicate` is nothing that can be done"),
        ("map a", "a size is missing"),
        ("map A 2M", "`A` is no name"),
        (
            "map a 2M purple",
            "`purple` is no backing: there are private",
        ),
        ("unmap a[3..3]", "has no pages"),
        ("unmap a[3", "has no end"),
        ("unmap a b", "`b` is too much"),
        ("cpu write a x", "`x` is no whole number"),
        ("cpu write a 1|2", "one value is written"),
        ("gpu dance", "`dance` is nothing that a device does"),
        ("expect luck", "`luck` cannot be expected"),
        ("expect count luck 3", "there is no counter `luck`"),
        ("expect placed a moon", "`moon` is no place"),
        ("sleep 3", "`3` is no time"),
        ("at noon", "`noon` is no point: there are after-walk"),
        ("advise a wisely", "`wisely` is no advice"),
        ("model: mark", "a line for one host says why"),
        ("mark x0", "no times"),
        ("together", "has no `end`"),
        (
            "together\n fork\n end\n end",
            "a block holds no other block",
        ),
        (
            "fork\n cpu read a\n end",
            "in `fork` a child reads and writes",
        ),
        ("fork\n child read a -> SIGSEGV\n end", "in `fork` a child"),
        ("mark\n  gpus 2", "belongs before"),
        ("gpus 0", "0 is not in 1 to 8"),
        ("gpus 70000", "70000 is not in 1 to 8"),
        ("seeds 0", "0 is not in 1 to"),
        ("vram 900T", "is not in 4096 to"),
        ("memory 900T", "is not in 4096 to"),
        ("window 900T", "is not in 4096 to"),
        ("window 12K", "a power of two"),
        ("cpu read a[4503599627370496] 1", "is further than any area"),
        ("cpu read a[4503599627370495] 1", "is further than any area"),
    ] {
        let said = said_of(line);
        assert!(said.starts_with("some.scn:"), "{said}");
        assert!(said.contains(what), "`{line}`: {said}");
    }
    let said = parse("some.scn", "map a 2M")
        .expect_err("no scenario")
        .to_string();
    assert!(said.starts_with("some.scn:1: a scenario begins"), "{said}");
}

#[test]
fn lines_say_for_whom_how_often_and_how_they_end() {
    let text = "scenario 7 a title\n live skipped: why not\n model: seeds 3 -- enough\n map a 2M\n \
                model: gpu1 write a[1M..5M] 7@3 x9 -> ok|EPERM -- because\n";
    let scenarios = parse("some.scn", text).expect("it can be read");
    let [scenario] = scenarios.as_slice() else {
        panic!("one scenario: {scenarios:?}")
    };
    assert_eq!((scenario.number(), scenario.title()), (7, "a title"));
    assert_eq!(scenario.skips(HostKind::Live), Some("why not"));
    assert_eq!(scenario.setup(HostKind::Model).seeds, 3);
    assert_eq!(scenario.setup(HostKind::Live).seeds, 1);
    let line = &scenario.lines[1];
    assert_eq!((line.only, line.times), (Some(HostKind::Model), 9));
    assert_eq!(line.answers, ["ok", "EPERM"]);
    let Act::Access(Who::Gpu(1), Access::Write(value), span) = &line.act else {
        panic!("{line:?}")
    };
    assert_eq!((value.value, value.from), (7, Some(3)));
    assert_eq!(span.part, Some((1 << 20, 5 << 20)));
}
