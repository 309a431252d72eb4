"""Names of the domains of M2D2 as published, with their misspellings and stray entries."""

from __future__ import annotations

# Wikipedia: a topic, and below it "topic__part".
_WIKIPEDIA = {
    "Art": "",
    "Culture_and_the_arts": (
        "Culture_and_Humanities Games_and_Toys Mass_media Performing_arts Sports_and_Recreation "
        "The_arts_and_Entertainment Visual_arts"
    ),
    "General_referece": "Further_research_tools_and_topics Reference_works",
    "Health_and_fitness": "Exercise Health_science Human_medicine Nutrition Public_health Self_care",
    "History_and_events": "By_continent By_period By_region",
    "Human_activites": "Human_activities Impact_of_human_activity",
    "Mathematics_and_logic": "Fields_of_mathematics Logic Mathematics",
    "Natural_and_physical_sciences": "Biology Earth_sciences Nature Physical_sciences",
    "Philosophy": "",
    "Philosophy_and_thinking": "Philosophy Thinking",
    "Religion_and_belief_systems": "Allah Belief_systems Major_beliefs_of_the_world",
    "Society_and_social_sciences": "Social_sciences Society",
    "Technology_and_applied_sciences": "Agriculture Computing Engineering Transport",
}
# arXiv: a subject, and below it "subject.part".
_ARXIV = {
    "astro-ph": "CO EP GA HE IM SR",
    "cond-mat": "dis-nn mes-hall mtrl-sci other quant-gas soft stat-mech str-el supr-con",
    "cs": (
        "AI AR CC CE CG CL CR CV CY DB DC DL DM DS ET FL GL GR GT HC IR IT LG LO MA MM MS NA NE NI OH OS PF "
        "PL RO SC SD SE SI SY"
    ),
    "econ": "EM GN TH",
    "eess": "AS IV SP SY",
    "math": "AC AG AP AT CA CO CT CV DG DS FA GM GN GR GT HO IT KT LO MG MP NA NT OA OC PR QA RA RT SG SP ST",
    "nlin": "AO CD CG PS SI",
    "physics": (
        "acc-ph ao-ph app-ph atm-clus atom-ph bio-ph chem-ph class-ph comp-ph data-an ed-ph flu-dyn gen-ph "
        "geo-ph hist-ph ins-det med-ph optics plasm-ph pop-ph soc-ph space-ph"
    ),
    "q-bio": "BM CB GN MN NC OT PE QM SC TO",
    "q-fin": "CP EC GN MF PM PR RM ST TR",
    "stat": "AP CO ME ML OT TH",
}
_SINGLE = (
    "alg-geom ao-sci astro-ph atom-ph bayes-an chao-dyn chem-ph cmp-lg comp-gas cond-mat dg-ga funct-an gr-qc "
    "hep-ex hep-lat hep-ph hep-th math-ph mtrl-th nucl-ex nucl-th patt-sol plasm-ph q-alg q-bio quant-ph "
    "solv-int supr-con eval_sets only_text only_txt2"
)
# Correct and published spelling.
_PUBLISHED_SPELLING = {"General_reference": "General_referece", "Human_activities": "Human_activites"}

DOMAINS = frozenset(
    [
        *_WIKIPEDIA,
        *(f"{topic}__{part}" for topic, parts in _WIKIPEDIA.items() for part in parts.split()),
        *(f"{subject}.{part}" for subject, parts in _ARXIV.items() for part in parts.split()),
        *(f"{subject}_l1" for subject in _ARXIV),
        *_SINGLE.split(),
    ]
)


def official_name(name: str) -> str:
    """Return the published spelling of a domain's name."""
    topic, bar, part = name.partition("__")
    return _PUBLISHED_SPELLING.get(topic, topic) + bar + part
