//! Helpers of the checks: where the tree is, what files it has, what functions stand in them; and
//! what scenarios share ([`stage`]).

pub mod stage;

use std::fs;
use std::path::{Path, PathBuf};

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// The root of the workspace.
#[must_use]
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent()
        .map_or_else(|| here.to_owned(), Path::to_owned)
}

/// In the environment: pages are written instead of compared.
const REWRITE: &str = "GPUSVM_REWRITE";

/// Asserts that the page at `path` below the root is `text`, which `test` makes of something else.
///
/// # Panics
/// Where it is not.
pub fn assert_page(path: &str, text: &str, test: &str) {
    let at = root().join(path);
    if std::env::var_os(REWRITE).is_some() {
        fs::write(&at, text).expect("the page can be written");
    }
    let found = fs::read_to_string(&at).unwrap_or_default();
    let hint = format!("{path} is old: {REWRITE}=1 cargo test -p gpusvm-tests --test {test}");
    assert!(found == text, "{hint}");
}

/// Says that a test cannot run here, and why.
#[expect(clippy::print_stdout, reason = "a test's own output")]
pub fn skipped(reason: &dyn std::fmt::Display) {
    println!("skipped: {reason}");
}

/// One source file, parsed.
#[derive(Debug)]
pub struct Source {
    /// Path below the root.
    pub path: String,
    /// Text.
    pub text: String,
    /// What it says.
    pub file: syn::File,
}

impl Source {
    /// Name of the crate's folder, `core` for `crates/core/src/svm.rs`.
    #[must_use]
    pub fn krate(&self) -> &str {
        self.path
            .strip_prefix("crates/")
            .and_then(|rest| rest.split('/').next())
            .unwrap_or("tests")
    }

    /// Name of the module: the file's, or its folder's.
    #[must_use]
    pub fn module(&self) -> &str {
        let stem = self.path.trim_end_matches(".rs");
        let stem = stem.strip_suffix("/mod").unwrap_or(stem);
        stem.rsplit('/').next().unwrap_or(stem)
    }

    /// Whether the whole file is tests.
    #[must_use]
    pub fn is_test(&self) -> bool {
        self.module().starts_with("test") || self.path.starts_with("tests/")
    }
}

/// All Rust sources of the workspace.
///
/// # Panics
/// Where a file cannot be read or parsed: the tree does not build then, either.
#[must_use]
pub fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    for folder in ["crates", "tests"] {
        walk(&root().join(folder), "rs", &mut paths);
    }
    paths.sort();
    paths
        .into_iter()
        .map(|path| {
            let text = fs::read_to_string(&path).expect("a source can be read");
            let file = syn::parse_file(&text).expect("a source can be parsed");
            let path = path
                .strip_prefix(root())
                .unwrap_or(&path)
                .display()
                .to_string();
            Source { path, text, file }
        })
        .collect()
}

/// Files below `folder` with this extension.
pub fn walk(folder: &Path, extension: &str, out: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            walk(&path, extension, out);
        } else if path.extension().is_some_and(|found| found == extension) {
            out.push(path);
        }
    }
}

/// One function.
#[derive(Clone, Debug)]
pub struct Function {
    /// Type whose function it is; empty for a free one.
    pub owner: String,
    /// Name.
    pub name: String,
    /// First line of its signature, from 1.
    pub line: usize,
    /// Lines from the signature to the closing brace.
    pub lines: usize,
    /// It stands in test code.
    pub in_tests: bool,
}

/// All functions of a file.
#[must_use]
pub fn functions(source: &Source) -> Vec<Function> {
    let mut finder = Finder {
        owner: String::new(),
        in_tests: source.is_test(),
        found: Vec::new(),
    };
    finder.visit_file(&source.file);
    finder.found
}

struct Finder {
    owner: String,
    in_tests: bool,
    found: Vec<Function>,
}

impl Finder {
    fn note(&mut self, signature: &syn::Signature, end: proc_macro2::Span) {
        let line = signature.span().start().line;
        self.found.push(Function {
            owner: self.owner.clone(),
            name: signature.ident.to_string(),
            line,
            lines: end.end().line - line + 1,
            in_tests: self.in_tests,
        });
    }
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let former = self.in_tests;
        self.in_tests |= module.ident == "tests";
        visit::visit_item_mod(self, module);
        self.in_tests = former;
    }

    fn visit_item_impl(&mut self, block: &'ast syn::ItemImpl) {
        let former = core::mem::take(&mut self.owner);
        if let syn::Type::Path(path) = &*block.self_ty {
            self.owner = path
                .path
                .segments
                .last()
                .map(|s| s.ident.to_string())
                .unwrap_or_default();
        }
        visit::visit_item_impl(self, block);
        self.owner = former;
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.note(&function.sig, function.block.span());
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.note(&function.sig, function.block.span());
        visit::visit_impl_item_fn(self, function);
    }
}
