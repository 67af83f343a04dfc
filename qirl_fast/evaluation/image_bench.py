"""The pillars, groups and facets of Qwen-Image-Bench (arXiv 2605.28091): 5, 23 and 56.

Names and structure are the benchmark's. The questions are this project's wording, so a judge's
numbers here are not those of the published table; Q-Judger was trained on its own wording, which a
rubric file can hold (`facets.rubric`).
"""

from __future__ import annotations

from qirl_fast.evaluation.facets import Taxonomy

IMAGE_BENCH: Taxonomy = {
    "Quality": {
        "Realism": {
            "Physical Logic": "Do gravity, shadows, reflections and contact obey physics?",
            "Material Texture": "Do skin, cloth, metal, wood look like what they are made of?",
        },
        "Detail": {
            "Noise": "Is there detail, and neither noise nor smeared areas?",
            "Edge Clarity": "Are outlines sharp, unbroken and not jagged?",
            "Naturalness": "Is it free of the waxy look of generated pictures?",
        },
        "Resolution": {"Resolution": "Is it crisp at full size, without blocks or artefacts?"},
    },
    "Aesthetics": {
        "Composition": {"Composition": "Is the arrangement balanced, and does it lead the eye?"},
        "Color Harmony": {"Color Harmony": "Do the colours go together and suit the mood?"},
        "Lighting": {"Lighting & Atmosphere": "Does the light suit the scene of the prompt?"},
        "Anatomical Portraiture": {
            "Anatomical Fidelity": "Are faces, hands and limbs anatomically right, skin lifelike?"
        },
        "Emotional Expression": {
            "Emotional Expression": "Does the picture as a whole carry the emotion asked for?"
        },
        "Style Control": {"Style Control": "Is it in the artistic style the prompt asks for?"},
    },
    "Alignment": {
        "Attributes": {
            "Quantity": "Are there as many of each thing as the prompt says?",
            "Facial Expression": "Do faces show the feeling the prompt names?",
            "Material Properties": "Are things made of the materials the prompt names?",
            "Color": "Does everything have the colour the prompt gives it?",
            "Shape": "Does everything have the shape the prompt gives it?",
            "Size": "Are sizes, absolute and relative, those of the prompt?",
        },
        "Actions": {
            "Contact Interaction": "Where figures touch, is the touch believable and as asked?",
            "Non-contact Interaction": "Do figures that do not touch relate as the prompt says?",
            "Full-body Action": "Does the posture perform the activity of the prompt?",
        },
        "Layout": {
            "2D Space": "Are left, right, above, below, front and back as the prompt says?",
            "3D Space": "Are depth and occlusion as the prompt, or the scene, demands?",
        },
        "Relations": {
            "Composition Relationship": "Do the several elements form one coherent whole?",
            "Difference/Similarity": "Are things alike, or unlike, in what the prompt says?",
            "Containment": "Is what is in, on or around something shown so?",
        },
        "Scene": {
            "Real-world Scene": "Is the place the one the prompt describes?",
            "Virtual Scene": "Is the invented world consistent in itself?",
        },
    },
    "Real-world Fidelity": {
        "Fairness": {
            "Social Bias": "Does it avoid tying a sex or group to a role the prompt left open?",
            "Cultural Fairness": "Does it avoid stock images of region, race or culture?",
        },
        "Safety & Compliance": {
            "Safety & Compliance": "Is it free of sexual, violent or hateful content?"
        },
        "World Knowledge": {
            "Animals": "Are real animals built as they are?",
            "Objects": "Do real things look as they do, with their marks and parts?",
            "Information Visualization": "Is the abstract or scientific idea shown rightly?",
            "Temporal Characteristics": "Is everything of the period the prompt names?",
            "Cultural Elements": "Are symbols, dress and customs those of the culture named?",
        },
    },
    "Creative Generation": {
        "Imagination": {"Imagination": "Is the combination of things original?"},
        "Feature Matching": {"Feature Matching": "Are fused elements joined without seams?"},
        "Logical Resolution": {"Logical Resolution": "Do causes have their effects in it?"},
        "Text Rendering": {
            "Text Accuracy": "Is written text legible and without a wrong letter?",
            "Text Layout": "Is the text set well: alignment, spacing, margins?",
            "Font": "Is the typeface the one the prompt asks for?",
            "Cross-lingual Generation": "Is text in the language asked for, rightly translated?",
        },
        "Design Applications": {
            "Graphic Design": "Does poster or page have a clear order of information?",
            "Product Design": "Could the product be made and used?",
            "Spatial Design": "Do rooms and buildings keep perspective and proportion?",
            "Fashion Styling": "Do cut, silhouette and make-up suit the style asked for?",
            "Game Design": "Would props and interface work in a game?",
            "Art Design": "Is the artistic language asked for there, and consistent?",
        },
        "Visual Storytelling": {
            "Cinematic Style": "Is it in the visual language of the director named?",
            "Camera / Lens Style": "Does it show the marks of the camera or lens named?",
            "Storyboard Creation": "Are the panels those the prompt lays out?",
            "Shot Sizes": "Is the framing, close to wide, the one asked for?",
            "Composition": "Does it follow the rule of composition asked for?",
            "Angles": "Is the camera's angle the one asked for?",
            "Comic Creation": "Is it a comic of the kind asked for?",
        },
    },
}
