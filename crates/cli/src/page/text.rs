//! Text inside HTML.

use std::fmt;

/// Displays text so that it is text in HTML and in attributes, whatever it contains.
#[derive(Clone, Copy, Debug)]
pub(super) struct Escaped<T>(pub(super) T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::write(&mut Escaping(f), format_args!("{}", self.0))
    }
}

/// Escapes what is written through it.
struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl fmt::Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|c| self.write_char(c))
    }

    fn write_char(&mut self, c: char) -> fmt::Result {
        match c {
            '&' => self.0.write_str("&amp;"),
            '<' => self.0.write_str("&lt;"),
            '>' => self.0.write_str("&gt;"),
            '"' => self.0.write_str("&quot;"),
            '\'' => self.0.write_str("&#39;"),
            '\n' | '\t' => self.0.write_char(c),
            // HTML has no other control characters.
            c if c.is_control() => self.0.write_char(char::REPLACEMENT_CHARACTER),
            c => self.0.write_char(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_means_something_in_html_is_only_text() {
        let text = Escaped("<b a=\"1\" b='2'>&amp;\0\n</b> a\u{e4}b").to_string();
        assert_eq!(
            text,
            "&lt;b a=&quot;1&quot; b=&#39;2&#39;&gt;&amp;amp;\u{fffd}\n&lt;/b&gt; a\u{e4}b"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_tag_or_attribute_can_be_opened(text: String) {
            let escaped = Escaped(&text).to_string();
            proptest::prop_assert!(!escaped.contains(['<', '>', '"', '\'']));
            proptest::prop_assert!(escaped.len() >= text.len());
        }
    }
}
