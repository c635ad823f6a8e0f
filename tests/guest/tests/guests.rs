//! Programs that know nothing of gpusvm run inside it: C programs, as the compiler makes them, with
//! the runtime preloaded. Whatever migrates under them, they print what they print without it.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Nobody.
const USER: u32 = 65534;
/// Seconds after which a program hangs. They take less than one.
const PATIENCE: &str = "60";
/// Times that a program's work is doubled when it was over before enough had migrated.
const DOUBLINGS: u32 = 8;

/// Who runs a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum As {
    /// Whoever runs the test.
    Oneself,
    /// Somebody without privileges: faults of system calls are not served.
    Nobody,
}

/// How a program is run.
#[derive(Clone, Copy, Debug)]
struct Way {
    migration: &'static str,
    brackets: &'static str,
    user: As,
}

const fn way(migration: &'static str, brackets: &'static str, user: As) -> Way {
    Way {
        migration,
        brackets,
        user,
    }
}

const PRIVILEGED: [Way; 4] = [
    way("adopt", "patched", As::Oneself),
    way("copy", "patched", As::Oneself),
    way("adopt", "events", As::Oneself),
    way("copy", "events", As::Oneself),
];
const UNPRIVILEGED: [Way; 2] = [
    way("adopt", "patched", As::Nobody),
    way("copy", "patched", As::Nobody),
];

/// A program and what it needs, in a folder that everybody may read.
struct Guest {
    folder: PathBuf,
    program: PathBuf,
    library: PathBuf,
    /// Its second argument, after the number of rounds; without one it is told of the brackets.
    argument: Option<&'static str>,
}

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// By itself.
    Alone,
    /// With the runtime.
    Inside,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    code: Option<i32>,
    output: Vec<u8>,
}

#[expect(clippy::print_stdout, reason = "a test's own output")]
fn tell(line: &str) {
    println!("{line}");
}

impl Guest {
    /// Compiles a program; `None`, and says so, where that is not possible.
    fn new(name: &str, argument: Option<&'static str>) -> Option<Self> {
        let variant = argument.unwrap_or("plain");
        let folder = format!("gpusvm-{}-{name}-{variant}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir_all(&folder).expect("a folder can be made");
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).expect("it is ours");
        let guest = Self {
            program: folder.join("program"),
            library: folder.join("runtime.so"),
            folder,
            argument,
        };
        // Built together with this test, beside it.
        let test = std::env::current_exe().expect("this program has a path");
        let built = test.with_file_name("libgpusvm_guest.so");
        fs::copy(built, &guest.library).expect("the library was built");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs");
        let compiled = Command::new("cc")
            .args(["-O1", "-pthread", "-o"])
            .arg(&guest.program)
            .arg(source.join(name).with_extension("c"))
            .status();
        match compiled {
            Ok(status) => {
                assert!(status.success(), "{name}.c does not compile");
                Some(guest)
            }
            Err(error) => {
                tell(&format!("skipped: no C compiler: {error}"));
                None
            }
        }
    }

    /// Runs it for `rounds` rounds, with the runtime where that is wanted.
    fn run(&self, rounds: u32, way: Way, place: Place) -> Ended {
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", PATIENCE, "env"]);
        if place == Place::Inside {
            command.arg(format!("LD_PRELOAD={}", self.library.display()));
            command.arg(format!("GPUSVM_GUEST_STATS={}", self.stats().display()));
            command.arg(format!("GPUSVM_GUEST_MIGRATION={}", way.migration));
            command.arg(format!("GPUSVM_GUEST_BRACKETS={}", way.brackets));
            if way.user == As::Oneself {
                // With it a thread's control block is touched whenever the thread is scheduled, so
                // that it is never away for long; without it, as in older C libraries, it may be.
                command.arg("GLIBC_TUNABLES=glibc.pthread.rseq=0");
            } else if is_root() {
                command.uid(USER).gid(USER);
            }
        }
        command.arg(&self.program).arg(rounds.to_string());
        command.arg(self.argument.unwrap_or(way.brackets));
        let output = command.output().expect("timeout is there");
        Ended {
            code: output.status.code(),
            output: output.stdout,
        }
    }

    fn stats(&self) -> PathBuf {
        self.folder.join("stats")
    }

    /// An empty file for what happens, which everybody may write.
    fn clear_stats(&self) {
        File::create(self.stats()).expect("a file can be made");
        fs::set_permissions(self.stats(), Permissions::from_mode(0o666)).expect("it is ours");
    }

    /// Runs it with and without the runtime, until at least `enough` moves to the device have
    /// happened in one run, and the program has touched some of it there.
    fn compare(&self, rounds: u32, way: Way, enough: u64) {
        for doubled in 0..=DOUBLINGS {
            let rounds = rounds << doubled;
            let (alone, alone_ms) = timed(|| self.run(rounds, way, Place::Alone));
            self.clear_stats();
            let (inside, inside_ms) = timed(|| self.run(rounds, way, Place::Inside));
            let stats = fs::read_to_string(self.stats()).expect("the file is there");
            let stats = stats.trim();
            if stats.starts_with("skipped") {
                return tell(stats);
            }
            tell(&format!(
                "{way:?} rounds={rounds}: {alone_ms} ms alone, {inside_ms} ms inside, {stats}"
            ));
            assert_same(&alone, &inside, way, stats);
            if stats.is_empty() {
                // The program was over before anything could be sent.
                continue;
            }
            // What is seen late may concern pages that have no place any more.
            for lost in ["host_conflict_count", "host_gone_count"] {
                let none = number(stats, lost) == Some(0) || way.brackets == "events";
                assert!(none, "{way:?}: {stats}");
            }
            if number(stats, "moves") >= Some(enough) && number(stats, "cpu_fault_count") > Some(0)
            {
                return;
            }
        }
        panic!("{way:?}: too little has migrated");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // What is left of it is in the system's folder for such things.
        let _removed = fs::remove_dir_all(&self.folder);
    }
}

fn assert_same(alone: &Ended, inside: &Ended, way: Way, stats: &str) {
    assert_eq!(
        (alone.code, String::from_utf8_lossy(&alone.output)),
        (inside.code, String::from_utf8_lossy(&inside.output)),
        "{way:?}: {stats}"
    );
}

/// A number from the line that the runtime writes.
fn number(stats: &str, name: &str) -> Option<u64> {
    let mut words = stats.split_ascii_whitespace();
    words.find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// How long it took is shown to people; nothing is decided by it.
#[expect(clippy::disallowed_methods, reason = "there is no environment here")]
fn timed<R>(run: impl FnOnce() -> R) -> (R, u128) {
    let start = std::time::Instant::now();
    let result = run();
    (result, start.elapsed().as_millis())
}

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        let line = status.lines().find(|line| line.starts_with("Uid:"));
        line.is_some_and(|line| line.split_ascii_whitespace().nth(2) == Some("0"))
    })
}

#[test]
fn heap_blocks_of_all_sizes_are_what_they_were() {
    let Some(guest) = Guest::new("memory", None) else {
        return;
    };
    for way in PRIVILEGED.into_iter().chain(UNPRIVILEGED) {
        guest.compare(10, way, 40);
    }
}

#[test]
fn threads_come_and_go_and_are_joined() {
    let Some(guest) = Guest::new("threads", None) else {
        return;
    };
    for way in PRIVILEGED.into_iter().chain(UNPRIVILEGED) {
        guest.compare(10, way, 40);
    }
}

#[test]
fn threads_on_stacks_of_the_program_are_joined() {
    let Some(guest) = Guest::new("threads", Some("own-stacks")) else {
        return;
    };
    for way in PRIVILEGED {
        guest.compare(10, way, 40);
    }
}

#[test]
fn children_signals_and_jumps_go_their_way() {
    let Some(guest) = Guest::new("processes", None) else {
        return;
    };
    for way in PRIVILEGED.into_iter().chain(UNPRIVILEGED) {
        guest.compare(10, way, 40);
    }
}

#[test]
fn system_calls_on_the_heap_wait_for_it() {
    let Some(guest) = Guest::new("stdio", None) else {
        return;
    };
    for way in PRIVILEGED {
        guest.compare(10, way, 40);
    }
}
