//! The live host: this process.

use crate::conformance::hmm::bench::{Plan, Trouble};
use crate::conformance::hmm::host::Need;

/// Why this host cannot show something honestly; `None` where it can.
pub(super) const fn lacks(need: Need) -> Option<&'static str> {
    match need {
        Need::CoherentMemory => Some(
            "device memory that the CPU uses in place needs a second NUMA node; \
             the node does not open, as in a kernel without such memory",
        ),
        Need::GupTest => Some("the kernel's own test of pins (gup_test) is not in this kernel"),
        Need::PrivateFilePages => Some(
            "userfaultfd refuses private mappings of files; copying the pages would show what the \
             case looks at, and not what it is about",
        ),
    }
}

/// Runs a case in this process.
pub(super) fn run(_plan: Plan) -> Result<Vec<String>, Trouble> {
    Err(Trouble::Lacking("not yet".into()))
}
