//! What Linux answered: a text file, a section for each case.

use crate::conformance::hmm::bench::Effort;
use crate::conformance::hmm::host::Variant;

const TEXT: &str = include_str!("linux-7.3.4.facts");

/// The file, section by section.
pub(super) struct Facts(Vec<(String, Vec<String>)>);

impl Facts {
    /// Reads the file, and writes repetitions out.
    pub(super) fn read() -> Self {
        let mut sections: Vec<(String, Vec<String>)> = Vec::new();
        for line in TEXT.lines() {
            if let Some(head) = line.strip_prefix('[') {
                let name = head.trim_end_matches(']').to_owned();
                sections.push((name, Vec::new()));
            } else if let Some((_, lines)) = sections.last_mut()
                && !line.is_empty()
            {
                lines.extend(repeated(line));
            }
        }
        Self(sections)
    }

    fn section(&self, variant: Variant, case: &str) -> Option<&[String]> {
        let name = format!("{} {case}", variant.name());
        let found = self.0.iter().find(|(head, _)| *head == name);
        found.map(|(_, lines)| &lines[..])
    }

    /// Whether the case is there.
    #[cfg(test)]
    pub(super) fn has(&self, variant: Variant, case: &str) -> bool {
        self.section(variant, case).is_some()
    }

    /// Compares a record with the facts, line by line.
    pub(super) fn compare(
        &self,
        variant: Variant,
        case: &str,
        record: &[String],
        effort: Effort,
    ) -> Result<(), String> {
        let facts = self.section(variant, case).unwrap_or_default();
        let asked = |line: &&String| effort == Effort::Full || !line.contains(" 65536 ");
        let mut facts = facts.iter().filter(asked);
        for (n, line) in (1..).zip(record) {
            match facts.next() {
                Some(fact) if agrees(line, fact) => {}
                Some(fact) => return Err(format!("command {n}: `{line}`, Linux: `{fact}`")),
                None => return Err(format!("command {n}: `{line}`, Linux has no more")),
            }
        }
        match facts.next() {
            None => Ok(()),
            Some(fact) => Err(format!("the record ends before `{fact}`")),
        }
    }
}

/// The line, or lines in turn, as often as the mark at its end says.
fn repeated(line: &str) -> Vec<String> {
    let counted = line.rsplit_once(" x");
    let counted = counted.and_then(|(text, times)| Some((text, times.parse().ok()?)));
    let (text, times): (_, usize) = counted.unwrap_or((line, 1));
    let turns: Vec<_> = text.split(" ; ").map(str::to_owned).collect();
    (0..times).flat_map(|_| turns.clone()).collect()
}

/// Whether a line of a record is one of those that a fact allows.
fn agrees(line: &str, fact: &str) -> bool {
    let (Some((asked, answer)), Some((command, allowed))) =
        (line.split_once(" = "), fact.split_once(" = "))
    else {
        return false;
    };
    asked == command && allowed.split(" | ").any(|one| one == answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_allow_what_they_say_and_nothing_else() {
        assert_eq!(repeated("a b = 1 ; c = 2 x2").len(), 4);
        let fact = "a READ 4 = 4 1 | EFAULT";
        assert!(agrees("a READ 4 = EFAULT", fact));
        assert!(agrees("a READ 4 = 4 1", fact));
        assert!(!agrees("a READ 4 = 4 2", fact));
        assert!(!agrees("b READ 4 = EFAULT", fact));
    }

    #[test]
    fn records_that_are_short_long_or_wrong_differ() {
        let facts = Facts::read();
        let compare = |record: &[&str]| {
            let record: Vec<_> = record.iter().map(|line| (*line).to_owned()).collect();
            facts.compare(Variant::Private, "anon_read", &record, Effort::Full)
        };
        assert_eq!(compare(&["a READ 1024 = 1024 1"]), Ok(()));
        assert!(compare(&[]).is_err());
        assert!(compare(&["a READ 1024 = 1024 0"]).is_err());
        assert!(compare(&["a READ 1024 = 1024 1", "a READ 1 = 1 0"]).is_err());
    }
}
