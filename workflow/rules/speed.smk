# What Snakemake works out anew for every job or file though the answer is the same, kept: a third of a large plan's time.
# Defines no rules, and changes nothing of what is planned; patches.smk has the table of what is replaced.

import gc
from functools import cache
from threading import Timer

import snakemake.io
from snakemake.exceptions import WildcardError

# A plan of thousands of jobs is millions of objects that stay: looking for garbage among them takes a tenth of the time.
gc.set_threshold(20_000_000)


def once_per_rule(check):
    """Whether the script can be read, which does not differ between the jobs of a rule."""
    checked = set()

    def checks(*of_job):
        made_by = of_job[-1].rule
        if made_by not in checked:
            check(*of_job)
            checked.add(made_by)

    return checks


@cache
def parts_of(pattern):
    """Of a path's pattern in turn: the text before a wildcard, the wildcard's name; at last the text behind them, None."""
    parts, end = [], 0
    for match in snakemake.io.WILDCARD_REGEX.finditer(pattern):
        parts.append((pattern[end : match.start()], match["name"]))
        end = match.end()
    return (*parts, (pattern[end:], None))


def filled(pattern, wildcards):
    """A path of its pattern."""
    try:
        return "".join(
            text if name is None else f"{text}{wildcards[name]}"
            for text, name in parts_of(pattern)
        )
    except KeyError as missing:
        raise WildcardError(str(missing)) from None


def once_per_file(find):
    """The jobs that make a file, which are the same for all that read it as long as this plan lasts."""
    found = {}

    async def file2jobs(dag, targetfile, wildcards_dict=None):
        if not dag.job_cache:  # none yet, or the plan was finished and another begins
            found.clear()
        if targetfile not in found:
            found[targetfile] = await find(dag, targetfile, wildcards_dict)
        return found[targetfile]

    return file2jobs


def of_equal_depth(matches):
    """Whether a rule makes a file. No wildcard holds a slash, so only patterns as deep as the path have to be matched."""
    depths = {}

    def is_producer(made_by, path):
        if made_by not in depths:
            depths[made_by] = {
                str(product).count("/") for product in made_by.products()
            }
        return path.count("/") in depths[made_by] and matches(made_by, path)

    return is_producer


def unless_one_comes(scheduler, delay):
    """Look for jobs to start after a delay. Snakemake's limit of jobs per second asks for this in every look and every look
    asked for is followed by another: after hundreds of jobs hundreds a second, which took a quarter of a core.
    """
    if not getattr(scheduler, "look_comes", False):
        scheduler.look_comes = True
        timer = Timer(delay, look, [scheduler])
        timer.daemon = True  # the end of the run need not wait for it
        timer.start()


def look(scheduler):
    """Have the scheduler look for jobs now."""
    scheduler.look_comes = False
    scheduler._open_jobs.release()
