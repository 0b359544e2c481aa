//! What we hand out besides programs says what the programs do: example configuration, manual pages, README.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use ferry_contract::config::Config;
use ferry_tests::checkout::{checkout, files, text, there_is};

/// The lines `key = value` of the example configuration.
fn defaults() -> Result<Vec<(String, String)>> {
    let example = text("packaging/virt-ferry.toml")?;
    let lines = example.lines().filter_map(|line| line.strip_prefix('#'));
    let keys = lines.filter(|line| line.starts_with(|first: char| first.is_ascii_lowercase()));
    keys.map(|line| {
        let (key, value) = line.split_once(" = ").with_context(|| line.to_owned())?;
        Ok((key.to_owned(), value.to_owned()))
    })
    .collect()
}

#[test]
fn the_example_configuration_has_every_key_and_its_default() -> Result<()> {
    let example = text("packaging/virt-ferry.toml")?;
    ensure!(
        Config::parse(&example)? == Config::default(),
        "it is not all commented out"
    );
    let defaults = defaults()?;
    let all: Vec<_> = defaults
        .iter()
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    ensure!(
        Config::parse(&all.join("\n"))? == Config::default(),
        "{all:#?} is not the default"
    );
    // Every field of Config, by name: Debug is derived. A table's keys have its name in front.
    let config = format!("{:?}", Config::default());
    let fields = config.split_once('{').context("Config")?.1;
    let fields = fields
        .split([' ', '{', '}'])
        .filter_map(|word| word.strip_suffix(':'));
    let fields: Vec<_> = fields.collect();
    let keys = defaults.iter().flat_map(|(key, _)| key.split('.'));
    let keys: Vec<_> = keys.collect();
    ensure!(keys == fields, "keys {keys:?}, fields {fields:?}");
    Ok(())
}

#[test]
fn readme_and_manual_know_every_key_and_its_default() -> Result<()> {
    let readme = text("README.md")?;
    let manual = text("packaging/man/virt-ferry.toml.5")?
        .replace("\\-", "-")
        .replace("\\(dq", "\"");
    for (key, value) in defaults()? {
        let row = format!("| `{key}` | `{value}` |");
        ensure!(readme.contains(&row), "README.md has no {row}");
        ensure!(
            manual.contains(&format!(".BR {key} ")),
            "the manual page has no {key}"
        );
        let page = manual
            .split(".TP\n")
            .find(|part| part.starts_with(&format!(".BR {key} ")));
        ensure!(
            page.is_some_and(|page| page.contains(&value)),
            "the manual page has no {value}"
        );
    }
    Ok(())
}

/// What is written for people, in Markdown.
const PAGES: [&str; 5] = [
    "README.md",
    "docs/cold.md",
    "packaging/README.md",
    "tests/guests/README.md",
    "xml-schemas/README.md",
];

/// What stands between `begin` and `end`, each time.
fn between<'a>(text: &'a str, begin: &str, end: char) -> Vec<&'a str> {
    let parts = text.split(begin).skip(1);
    parts.filter_map(|part| Some(part.split_once(end)?.0)).collect()
}

#[test]
fn what_a_page_links_to_is_there() -> Result<()> {
    for page in PAGES {
        let (text, directory) = (text(page)?, checkout().join(page));
        let directory = directory.parent().context("a directory")?;
        for link in between(&text, "](", ')') {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            if file.starts_with("https:") {
                continue;
            }
            let there = match file {
                "" => checkout().join(page),
                file => directory.join(file),
            };
            ensure!(there.exists(), "{page}: there is no {link}");
            // As it is made of a heading's words.
            let headings = match heading {
                "" => continue,
                _ => fs::read_to_string(&there)?,
            };
            let mut headings = headings.lines().filter(|line| line.starts_with('#'));
            ensure!(
                headings.any(|line| line
                    .trim_start_matches('#')
                    .trim()
                    .to_lowercase()
                    .replace(' ', "-")
                    == heading),
                "{page}: {link} has no such heading"
            );
        }
    }
    Ok(())
}

/// Blocks of commands begin with "```sh" or another word and end with "```": one that lost its first line turns the rest of
/// the page inside out.
#[test]
fn blocks_of_commands_have_a_beginning_and_an_end() -> Result<()> {
    for page in PAGES {
        let mut inside = false;
        for (number, line) in text(page)?.lines().enumerate() {
            if let Some(language) = line.strip_prefix("```") {
                ensure!(
                    inside == language.is_empty(),
                    "{page}, line {}: a block begins or ends where it should not",
                    number + 1
                );
                inside = !inside;
            }
        }
        ensure!(!inside, "{page} ends in a block of commands");
    }
    Ok(())
}

#[test]
fn the_command_that_shows_a_claim_finds_a_test() -> Result<()> {
    // As tests/run and cargo's tests have their names, roughly: file::function.
    let mut tests = Vec::new();
    for part in ["driver", "hooks", "tests"] {
        for file in files(&checkout().join(part))? {
            let Some(module) = file.strip_suffix(".rs") else {
                continue;
            };
            let module = module.replace('/', "::");
            for after in text(&format!("{part}/{file}"))?.split("#[test]").skip(1) {
                tests.extend(
                    between(after, "fn ", '(')
                        .first()
                        .map(|name| format!("{module}::{name}")),
                );
            }
        }
    }
    ensure!(tests.len() > 200, "only {} tests were found", tests.len());
    let mut claims = 0;
    for page in PAGES {
        // A command may go over the end of a line.
        let text = text(page)?.replace("\n  ", " ").replace('\n', " ");
        for pattern in between(&text, "`tests/run ", '`') {
            let plain = pattern
                .chars()
                .all(|letter| letter == '_' || letter.is_ascii_alphanumeric());
            ensure!(
                !plain || tests.iter().any(|test| test.contains(pattern)),
                "{page}: no test has {pattern} in its name"
            );
            claims += usize::from(plain);
        }
    }
    ensure!(claims > 50, "only {claims} commands were found");
    Ok(())
}

#[test]
fn manual_pages_are_sound() -> Result<()> {
    if !there_is("groff", "groff-base") {
        return Ok(());
    }
    for page in ["virt-ferry.1", "virt-ferry.toml.5", "virt-ferry-engine.8"] {
        let output = Command::new("groff")
            .args(["-ww", "-man", "-Tutf8"])
            .arg(checkout().join("packaging/man").join(page))
            .output()
            .context("groff")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success() && said.is_empty(), "{page}: {said}");
        ensure!(output.stdout.len() > 1000, "{page} is empty");
    }
    Ok(())
}

#[test]
fn what_a_person_starts_explains_itself() -> Result<()> {
    // One that does not know --help begins its work: ended soon.
    let said = |program: &str, argument: &str| {
        Command::new("timeout")
            .args(["--kill-after=5", "10"])
            .arg(checkout().join(program))
            .arg(argument)
            .output()
            .with_context(|| program.to_owned())
    };
    for program in [
        "tests/run",
        "tests/demo",
        "tests/bench",
        "tests/lab",
        "tests/install",
        "packaging/install",
    ] {
        let output = said(program, "--help")?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success() && text.starts_with(&format!("Usage: {program}")),
            "{program}: {} {text}",
            output.status
        );
    }
    for program in ["tests/run", "tests/lab", "packaging/install"] {
        let output = said(program, "--no-such-option")?;
        let status = output.status.code();
        ensure!(
            matches!(status, Some(1 | 2)) && output.stdout.is_empty(),
            "{program}: {status:?}"
        );
    }
    Ok(())
}

#[test]
fn an_older_kernel_is_told_before_anything_is_built() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let uname = directory.path().join("uname");
    fs::write(&uname, "#!/bin/sh\necho 6.1.0-41-amd64\n")?;
    fs::set_permissions(&uname, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", directory.path().display(), std::env::var("PATH")?);
    let output = Command::new("timeout")
        .args(["--kill-after=5", "10"])
        .arg(checkout().join("tests/demo"))
        .env("PATH", path)
        .output()
        .context("tests/demo")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(1) && said.contains("Linux 6.1.0-41-amd64") && output.stdout.is_empty(),
        "{}: {said}",
        output.status
    );
    Ok(())
}
