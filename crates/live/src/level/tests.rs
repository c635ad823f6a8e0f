use super::*;
use std::process::Command;
use std::sync::Arc;

use crate::env::LiveEnv;
use crate::space::LiveSpace;
use crate::sys::child::forbid_userfaultfd;

const CASE: &str = "GPUSVM_LEVEL_CASE";

fn open(level: LevelChoice) -> Result<FaultLevel, OpenError> {
    let config = LiveConfig {
        level,
        ..LiveConfig::default()
    };
    let space = LiveSpace::open(&config, LiveEnv::new(1), Arc::new(()))?;
    let level = space.level().faults;
    space.close();
    Ok(level)
}

/// In a process of its own, which gives its userfaultfd up for good: this test, started again.
#[test]
fn where_userfaultfd_is_forbidden_the_best_level_is_mprotect() {
    const NAME: &str = "level::tests::where_userfaultfd_is_forbidden_the_best_level_is_mprotect";
    if std::env::var_os(CASE).is_none() {
        let program = std::env::current_exe().expect("the test binary");
        let mut command = Command::new(program);
        let again = command
            .args(["--exact", NAME, "--nocapture"])
            .env(CASE, "1")
            .output();
        let output = again.expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        return;
    }
    forbid_userfaultfd();
    let best = open(LevelChoice::Best).expect("it needs no userfaultfd");
    assert_eq!(best, FaultLevel::Mprotect);
    let config = LiveConfig::default();
    let chosen = allocate_for(&config).expect("as the space");
    assert_eq!(chosen, best);
    assert!(heap::is_wanted());
    for level in [FaultLevel::Full, FaultLevel::UserModeOnly] {
        let refused = open(LevelChoice::Forced(level)).expect_err("it was forbidden");
        let said = refused.to_string();
        assert!(said.contains(level.name()), "{said}");
        assert!(matches!(
            refused,
            OpenError::NoLevel {
                errno: Errno::PERM,
                ..
            }
        ));
    }
}

#[test]
fn every_level_says_what_it_does_not_cover() {
    let levels = [
        FaultLevel::Full,
        FaultLevel::UserModeOnly,
        FaultLevel::Mprotect,
        FaultLevel::Explicit,
    ];
    for level in levels {
        assert!(!level.limits().is_empty() && !level.remedy().is_empty());
        assert!(LevelChoice::Best.takes(level));
        let taken = levels.map(|other| LevelChoice::Forced(level).takes(other));
        assert_eq!(taken.iter().filter(|taken| **taken).count(), 1);
    }
}
