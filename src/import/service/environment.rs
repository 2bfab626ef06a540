//! The variables of a service: `environment`, and the files of `env_file`.

use super::{Effect, EnvName, ImportError, Node, Translation, Value};
use crate::{
    import::{
        interpolate::variables,
        tree::{get, items, pairs, text},
    },
    model::{dotenv, env},
};

impl Translation<'_> {
    /// Takes all variables of the service.
    pub(super) fn environment(&mut self) -> Result<(), ImportError> {
        for file in get(self.service, "env_file").map(items).unwrap_or_default() {
            self.env_file(file)?;
        }
        let Some(given) = get(self.service, "environment") else { return Ok(()) };
        for (name, value, line) in pairs(given) {
            // A part of it has no value, which is said of that part.
            if get(given, &name).is_some_and(|value| matches!(value.value, Value::Seq(_))) {
                continue;
            }
            // A name alone has its value from outside.
            let value = value.or_else(|| self.project.variables.get(&name).map(str::to_owned));
            let key = format!("environment.{name}");
            match (EnvName::try_from(name.as_str()), value) {
                (Ok(name), Some(value)) => match env::check_value(name.as_str(), &value) {
                    Ok(()) => drop(self.env.insert(name, value)),
                    Err(why) => self.refuse(line, &key, why),
                },
                (Ok(_), None) => self.note(line, &key, Effect::Dropped, "it has no value: set it by `demae env set`"),
                (Err(e), _) => self.refuse(line, "environment", e.to_string()),
            }
        }
        Ok(())
    }

    fn env_file(&mut self, file: &Node) -> Result<(), ImportError> {
        let path = text(file).or_else(|| get(file, "path").and_then(text)).unwrap_or_default();
        let is_required = get(file, "required").and_then(text) != Some("false");
        let read = match (self.project.options.read)(path) {
            Ok(read) => read,
            Err(_) if !is_required => return Ok(()),
            Err(why) => return Err(self.error(path, &why)),
        };
        let read = String::from_utf8(read).map_err(|_| self.error(path, "it is not UTF-8"))?;
        let values = match get(file, "format").and_then(text) {
            Some("raw") => dotenv::parse(&read, dotenv::Format::Docker).map(|values| (values, Vec::new())),
            _ => variables(&read, self.project.variables.known()),
        };
        let values = values.map_err(|problems| {
            let line = |(line, what): &(usize, String)| format!("{path}:{line}: {what}");
            ImportError(problems.iter().map(line).collect())
        })?;
        let (values, left_out) = values;
        self.env.extend(values);
        for name in left_out {
            let message = "a part of it has no value: set it by `demae env set`";
            self.note(file.line, &format!("env_file.{name}"), Effect::Dropped, message);
        }
        Ok(())
    }

    fn error(&self, path: &str, why: &str) -> ImportError {
        ImportError::one(format!("service `{}`: cannot read `{path}` of `env_file`: {why}", self.name))
    }
}
