"""What the Hub objects to in a card."""
import re

import yaml

__all__ = ['check_card']


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Find what the Hub objects to in a card's metadata: ``(errors, warnings)``."""
    front_matter = re.match(r'\s*---[ \t]*\n(.*?)\n---[ \t]*(?:\n|$)', content, re.DOTALL)
    if front_matter is None:
        return [], ['empty or missing yaml metadata in repo card']
    try:
        card = yaml.safe_load(front_matter[1])
    except yaml.YAMLError as error:
        return [f'Invalid YAML: {error}'], []
    if not isinstance(card, dict):
        return ['metadata must be a mapping'], []

    errors = []
    for name in ('library_name', 'license_name', 'license_link', 'pipeline_tag'):
        if not isinstance(card.get(name, ''), str):
            errors.append(f'"{name}" must be a string')
    for name in ('base_model', 'datasets', 'language', 'license', 'metrics', 'tags'):
        values = card.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            errors.append(f'"{name}" must be a string or a list of strings')
    relations = ('adapter', 'finetune', 'merge', 'quantized')
    if card.get('base_model_relation', relations[0]) not in relations:
        errors.append(f'"base_model_relation" must be one of {", ".join(relations)}')
    try:
        for i, model in enumerate(card.get('model-index', [])):
            if 'name' not in model:
                errors.append(f'"model-index[{i}].name" is required')
            for j, result in enumerate(model.get('results', [])):
                at = f'model-index[{i}].results[{j}]'
                required = {'task': ('type',), 'dataset': ('name', 'type')}
                errors += [
                    f'"{at}.{part}.{name}" is required'
                    for part, names in required.items() for name in names if name not in result.get(part, {})
                ]
                errors += [
                    f'"{at}.metrics[{k}].{name}" is required'
                    for k, metric in enumerate(result.get('metrics', [{}]))
                    for name in ('type', 'value') if name not in metric
                ]
    except (AttributeError, TypeError):
        errors.append('"model-index" must be a list of mappings with "name" and "results"')
    return errors, []
